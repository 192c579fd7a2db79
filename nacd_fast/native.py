"""The native modules, `_codec` and `_codec_cuda`, where they were built: the one place that imports them."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from . import __version__


def load(module_name: str = "_codec") -> ModuleType | None:
    """The native module, or None where it was not built. One that was built for another version is an error."""
    name = f"{__package__}.{module_name}"
    if find_spec(name) is None:
        return None
    module = import_module(name)
    if module.version() != __version__:
        raise ImportError(f"{name} is version {module.version()}, must be {__version__}; run `make build`")
    return module
