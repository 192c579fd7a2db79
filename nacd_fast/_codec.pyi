"""The native module (csrc/bind.cpp)."""

def version() -> str:
    """Version of the package that the module was built with."""
