"""`python -m nacd_fast.store` is `nacd store`."""

import sys

from ..cli import main

sys.exit(main(["store", *sys.argv[1:]]))
