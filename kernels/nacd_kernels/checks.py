"""Checks at the border of the package: each failure is one sentence with the name, the value and what it must be."""

from typing import Any

import torch
from torch import Tensor


def check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def check_frozen(name: str, x: Tensor | None) -> None:
    check(x is None or not x.requires_grad, f"{name} requires a gradient, but it is frozen in this op; detach it")


def check_like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Same device and dtype."""
    check(x.device == other.device, f"{name} is on {x.device}, {other_name} on {other.device}")
    check(x.dtype == other.dtype, f"{name} is {x.dtype}, {other_name} is {other.dtype}")


def check_linear(x: Tensor, w: Any, bias: Tensor | None, name: str = "") -> None:
    """w: dense, or quantised with a shape and a device. `name` is what stands before the names in a message."""
    check(
        len(w.shape) == 2 and x.ndim > 0 and x.shape[-1] == w.shape[1],
        f"x has {x.shape[-1] if x.ndim else 0} features, {name}w is {tuple(w.shape)}: must be [D_out, features of x]",
    )
    check(x.is_floating_point(), f"x is {x.dtype}: must be a float dtype")
    check(w.device == x.device, f"{name}w is on {w.device}, x on {x.device}")
    check_frozen(f"{name}bias", bias)
    if isinstance(w, Tensor):
        check_like(f"{name}w", w, "x", x)
        check_frozen(f"{name}w", w)
    if bias is not None:
        check(tuple(bias.shape) == (w.shape[0],), f"{name}bias is {tuple(bias.shape)}: must be [{w.shape[0]}]")
        check_like(f"{name}bias", bias, "x", x)


def check_lora(x: Tensor, w: Any, a: Tensor, b: Tensor, name: str = "") -> None:
    """The adapter of a layer that `check_linear` has passed."""
    ranked = a.ndim == 2 and a.shape[0] > 0 and a.shape[1] == w.shape[1]
    check(ranked, f"{name}a is {tuple(a.shape)}: must be [R, {w.shape[1]}]")
    check(
        tuple(b.shape) == (w.shape[0], a.shape[0]), f"{name}b is {tuple(b.shape)}: must be {(w.shape[0], a.shape[0])}"
    )
    check_like(f"{name}b", b, f"{name}a", a)
    check(a.device == x.device, f"{name}a is on {a.device}, x on {x.device}")
    check(a.dtype in (x.dtype, torch.float32), f"{name}a is {a.dtype}: must be torch.float32 or x's {x.dtype}")
