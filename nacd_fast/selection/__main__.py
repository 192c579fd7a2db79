"""`python -m nacd_fast.selection` is `nacd select`."""

import sys

from ..cli import main

sys.exit(main(["select", *sys.argv[1:]]))
