"""Checks at the border of the package: each failure is one sentence with the name, the value and what it must be."""

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


def check_lora(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> None:
    check(
        w.ndim == 2 and x.shape[-1] == w.shape[1],
        f"x has {x.shape[-1]} features, w is {tuple(w.shape)}: must be [D_out, {x.shape[-1]}]",
    )
    check_like("w", w, "x", x)
    check(a.ndim == 2 and a.shape[1] == w.shape[1], f"a is {tuple(a.shape)}: must be [R, {w.shape[1]}]")
    check(tuple(b.shape) == (w.shape[0], a.shape[0]), f"b is {tuple(b.shape)}: must be {(w.shape[0], a.shape[0])}")
    check_like("b", b, "a", a)
    check(a.device == x.device, f"a is on {a.device}, x on {x.device}")
    check(bias is None or tuple(bias.shape) == (w.shape[0],), f"bias must be [{w.shape[0]}]")
    check_frozen("w", w)
    check_frozen("bias", bias)
