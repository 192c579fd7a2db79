"""Norms and their derivatives beside PyTorch's.

    ours     rms_norm, layer_norm
    torch    transformers' RMSNorm composition; torch.nn.functional.layer_norm
    liger    Liger's fused RMSNorm, where it is installed and the device is a GPU; first order only

bench/memory_bound.py says what is timed and counted.
"""

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec

import torch
from memory_bound import FIRST_ORDER, Peer, compare, draw, tensors_moved, time_case
from timing import Rows, parser
from torch import Tensor
from torch.nn import functional as F

from nacd_kernels import layer_norm, rms_norm

CPU_SHAPES = ((520, 512), (1028, 768))
QUICK_SHAPES = ((65, 129),)
GPU_SHAPES = ((4096, 2048), (4096, 4096))  # OPT-1.3B, Llama-2-7B
EPS = 1e-5


def plain_rms(x: Tensor, w: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def affine(x: Tensor) -> tuple[Tensor, Tensor]:
    """A gain and a shift of x's width and type, the same numbers every time."""
    g = torch.Generator().manual_seed(2)
    w, b = (torch.randn(x.shape[-1], generator=g).bfloat16().to(x) for _ in range(2))
    return w, b


def peers_of(name: str, w: Tensor, b: Tensor) -> Mapping[str, Peer]:
    if name == "layer_norm":
        return {
            "": Peer(lambda x: layer_norm(x, w, b, EPS)),
            "torch": Peer(lambda x: F.layer_norm(x, x.shape[-1:], w, b, EPS)),
        }
    peers = {"": Peer(lambda x: rms_norm(x, w, EPS)), "torch": Peer(lambda x: plain_rms(x, w))}
    if w.device.type == "cuda":
        if find_spec("liger_kernel") is None:
            print("liger-kernel is not installed: not measured")
            return peers
        function = import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
        peers["liger"] = Peer(lambda x: function.apply(x, w, EPS, 0.0, "llama", False), FIRST_ORDER)
    return peers


def main() -> None:
    args = parser(__doc__).parse_args()
    device = torch.device(args.device)
    rows = Rows("norms", device)
    shapes = QUICK_SHAPES if args.quick else GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    for name in ("rms_norm", "layer_norm"):
        small = draw((65, 129), 1, device)
        w, b = affine(small[0])
        exact = peers_of(name, w.double(), b.double())["torch"].op
        compare(rows, name, peers_of(name, w, b), exact, small)
        for shape in shapes:
            x = draw(shape, 1, device)
            case = f"{name} {shape[0]}x{shape[1]}"
            time_case(rows, case, peers_of(name, *affine(x[0])), x, tensors_moved(1), 2 if args.quick else 15)
    rows.write(args.json)


if __name__ == "__main__":
    main()
