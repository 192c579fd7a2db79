"""The native module `_codec`, where it was built: the one place that imports it."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from . import __version__

NAME = f"{__package__}._codec"


def load() -> ModuleType | None:
    """The native module, or None where it was not built. One that was built for another version is an error."""
    if find_spec(NAME) is None:
        return None
    module = import_module(NAME)
    if module.version() != __version__:
        raise ImportError(f"{NAME} is version {module.version()}, must be {__version__}; run `make build`")
    return module


def explain() -> str:
    """One line for logs and reports: what the codec runs on."""
    if load() is None:
        return "codec: Python reference (the native module was not built; `make build` needs a C++20 compiler)"
    return f"codec: native module {__version__}"
