"""Activations and their derivatives beside PyTorch's.

    ours       relu, gelu, silu_mul, gelu_mul
    torch      torch.nn.functional's, times the other factor
    composed   silu as g * sigmoid(g): PyTorch's own silu has no forward mode of its backward
    liger      Liger's fused silu and tanh-gelu, where it is installed and the device is a GPU; first order only

bench/memory_bound.py says what is timed and counted.
"""

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec

import torch
from memory_bound import FIRST_ORDER, KINDS, Op, Peer, compare, draw, tensors_moved, time_case
from timing import Rows, parser
from torch.nn import functional as F

from nacd_kernels import gelu, gelu_mul, relu, silu_mul

CPU_SHAPES = ((520, 2048), (1028, 3072))
QUICK_SHAPES = ((65, 129),)
GPU_SHAPES = ((4096, 8192), (4096, 11008))  # OPT-1.3B, Llama-2-7B
NO_DUAL_PASS = tuple(kind for kind in KINDS if kind != "dual_pass")
CASES: dict[str, tuple[int, Op, Op]] = {
    "relu": (1, relu, F.relu),
    "gelu": (1, gelu, F.gelu),
    "gelu_tanh": (1, lambda x: gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "silu_mul": (2, silu_mul, lambda g, u: F.silu(g) * u),
    "gelu_mul_tanh": (2, lambda g, u: gelu_mul(g, u, "tanh"), lambda g, u: F.gelu(g, approximate="tanh") * u),
}


def peers_of(name: str, device: torch.device) -> Mapping[str, Peer]:
    _, ours, plain = CASES[name]
    peers = {"": Peer(ours), "torch": Peer(plain, NO_DUAL_PASS if name == "silu_mul" else KINDS)}
    if name == "silu_mul":
        peers["composed"] = Peer(lambda g, u: g * torch.sigmoid(g) * u)
    liger = {"silu_mul": "swiglu.LigerSiLUMulFunction", "gelu_mul_tanh": "geglu.LigerGELUMulFunction"}
    if device.type == "cuda" and name in liger:
        if find_spec("liger_kernel") is None:
            print("liger-kernel is not installed: not measured")
            return peers
        module, function = liger[name].split(".")
        peers["liger"] = Peer(getattr(import_module(f"liger_kernel.ops.{module}"), function).apply, FIRST_ORDER)
    return peers


def main() -> None:
    args = parser(__doc__).parse_args()
    device = torch.device(args.device)
    rows = Rows("activations", device)
    shapes = QUICK_SHAPES if args.quick else GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    for name, (count, _, plain) in CASES.items():
        peers = peers_of(name, device)
        compare(rows, name, peers, plain, draw((65, 129), count, device))
        for shape in shapes:
            case = f"{name} {shape[0]}x{shape[1]}"
            time_case(rows, case, peers, draw(shape, count, device), tensors_moved(count), 2 if args.quick else 9)
    rows.write(args.json)


if __name__ == "__main__":
    main()
