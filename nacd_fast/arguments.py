"""The command lines that are not made from the fields of config.py."""

import argparse
from typing import NoReturn

from .errors import InputError


class Parser(argparse.ArgumentParser):
    """Tells a wrong command line as any other bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog.removeprefix('nacd ')}: {message}")
