"""Rotary embedding and its derivatives beside transformers' composition.

    ours     rotary_embedding
    torch    x cos + rotate_half(x) sin, as transformers writes it

Heads are a transposed view, as in a model. bench/memory_bound.py says what is timed and counted; the op is linear, so
that a derivative reads only what it turns, and the tables are small beside it.
"""

import torch
from memory_bound import Op, Peer, compare, draw, time_case
from timing import Rows, parser
from torch import Tensor

from nacd_kernels import rotary_embedding

Shape = tuple[int, int, int, int]  # B, T, H, d
CPU_SHAPES: tuple[Shape, ...] = ((4, 130, 8, 64), (2, 514, 12, 64))
QUICK_SHAPES: tuple[Shape, ...] = ((1, 65, 2, 64),)
GPU_SHAPES: tuple[Shape, ...] = ((8, 512, 32, 64), (2, 2048, 32, 128))  # OPT-1.3B's heads, Llama-2-7B
MOVED = {"forward": 2, "gradient": 4, "forward_dual": 4, "dual_pass": 8, "step": 6}


def tables(x: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin [T, d] of x [B, T, H, d]."""
    T, d = x.shape[1], x.shape[3]
    angles = torch.arange(T)[:, None] * 10000.0 ** -(torch.arange(0, d, 2) / d)
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(x), angles.sin().to(x)


def ours(x: Tensor) -> Op:
    cos, sin = tables(x)
    return lambda x: rotary_embedding(x.transpose(1, 2), cos, sin).transpose(1, 2)


def plain(x: Tensor) -> Op:
    cos, sin = tables(x)

    def rotary(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        half = x.shape[-1] // 2
        return (x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin).transpose(1, 2)

    return rotary


def main() -> None:
    args = parser(__doc__).parse_args()
    device = torch.device(args.device)
    rows = Rows("rotary", device)
    shapes = QUICK_SHAPES if args.quick else GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    for B, T, H, d in shapes:
        (x,) = draw((B, T, H, d), 1, device)
        peers = {"": Peer(ours(x)), "torch": Peer(plain(x))}
        case = f"rotary {B}x{T} {H} heads of {d}"
        compare(rows, case, peers, plain(x.double()), [x])
        time_case(rows, case, peers, [x], MOVED, 2 if args.quick else 15)
    rows.write(args.json)


if __name__ == "__main__":
    main()
