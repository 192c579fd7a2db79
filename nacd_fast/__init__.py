"""nacd_fast: distils an instruction-tuning set into a few samples with learned prompts (arXiv 2504.09818).

Names load on first use, so that `import nacd_fast` loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .distilled import load_distilled
    from .unroll import unrolled_sgd
    from .updates import SGD, AdamW

__version__ = "0.1.0"
__all__ = ["SGD", "AdamW", "__version__", "load_distilled", "unrolled_sgd"]

_MODULE_OF = {"unrolled_sgd": "unroll", "load_distilled": "distilled", "SGD": "updates", "AdamW": "updates"}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
