"""What check_second_order says of peers' fused ops: which of them lose their second derivatives, and of which inputs.

    liger-kernel           rms_norm, layer_norm, swiglu, fused_linear_cross_entropy
    jvp-flash-attention    causal attention
    peft                   a LoRA linear layer: unfused, and right
    torch                  scaled_dot_product_attention, math: right
    ours                   the ops that stand in their places

A row a derivative d2/da db: `second_derivative_relative_error`, of reverse over reverse; 0 to rounding is right, 1 with
nothing found is missing altogether. An op that raises, and where one writes into its inputs, is printed. Without a GPU
Triton's kernels are interpreted (put right as for the tests, and with Triton's own rsqrt for libdevice's, which has no
body there). A peer that is not installed is skipped, and said to be.
"""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined

from peft import LoraConfig, get_peft_model
from timing import Rows, parser
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nacd_kernels import check_second_order, flash_attention, linear_cross_entropy, lora_linear, rms_norm, silu_mul
from nacd_kernels.second_order import FIRST, REVERSE

ROOT = Path(__file__).resolve().parent.parent
M, D, V, T = 6, 16, 33, 32  # T: the shortest that jvp-flash-attention takes
LABELS = torch.arange(M) % V
Case = tuple[Callable[..., Tensor], list[Tensor]]


def rand(*shape: int) -> Tensor:
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=g)


def liger() -> dict[str, Case]:
    norms: list[Any] = [import_module(f"liger_kernel.ops.{name}") for name in ("rms_norm", "layer_norm")]
    if not torch.cuda.is_available():
        for module in norms:
            module.rsqrt = import_module("interpreted").rsqrt
    rms = norms[0].LigerRMSNormFunction
    layer = norms[1].LigerLayerNormFunction
    swiglu_op = import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    loss = import_module("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction

    def rms_norm(x: Tensor, w: Tensor) -> Tensor:
        return rms.apply(x, w, 1e-6, 0.0, "llama", False)

    def layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return layer.apply(x, w, b, 1e-5)

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        return swiglu_op.apply(gate, up)

    def fused_linear_cross_entropy(h: Tensor, w: Tensor) -> Tensor:
        return loss.apply(h, w, LABELS.to(h.device))[0]

    return {
        "rms_norm": (rms_norm, [rand(3, D), 1 + 0.1 * rand(D)]),
        "layer_norm": (layer_norm, [rand(3, D), 1 + 0.1 * rand(D), rand(D)]),
        "swiglu": (swiglu, [rand(3, D), rand(3, D)]),
        "fused_linear_cross_entropy": (fused_linear_cross_entropy, [rand(M, D), rand(V, D)]),
    }


def jvp_flash_attention() -> dict[str, Case]:
    op = import_module("jvp_flash_attention.jvp_attention").JVPAttn

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return op.fwd_dual(q, k, v, causal=True)

    return {"attention": (attention, qkv())}


def qkv() -> list[Tensor]:
    return list(rand(3, 1, 1, T, T))


def peft_lora() -> dict[str, Case]:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(D, D + 1))
    layer = get_peft_model(model, LoraConfig(r=4, target_modules=["0"])).base_model.model[0]

    def lora_linear(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        names = {"lora_A.default.weight": a, "lora_B.default.weight": b}
        return torch.func.functional_call(layer.to(x.device), names, (x,))

    return {"lora_linear": (lora_linear, [rand(M, D), rand(4, D), rand(D + 1, 4)])}


def pytorch() -> dict[str, Case]:
    def sdpa_math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    return {"sdpa_math": (sdpa_math, qkv())}


def ours() -> dict[str, Case]:
    w, table = rand(D + 1, D), rand(V, D)
    return {
        "rms_norm": (lambda x: rms_norm(x, None), [rand(3, D)]),
        "silu_mul": (lambda gate, up: silu_mul(gate, up), [rand(3, D), rand(3, D)]),
        "linear_cross_entropy": (
            lambda h: linear_cross_entropy(h, table.to(h.device), LABELS.to(h.device)),
            [rand(M, D)],
        ),
        "flash_attention": (lambda q, k, v: flash_attention(q, k, v), qkv()),
        "lora_linear": (
            lambda x, a, b: lora_linear(x, w.to(x.device), None, a, b, 2.0),
            [rand(M, D), rand(4, D), rand(D + 1, 4)],
        ),
    }


PEERS: dict[str, tuple[str, Callable[[], dict[str, Case]]]] = {  # name: (what must be importable, its cases)
    "liger-kernel": ("liger_kernel", liger),
    "jvp-flash-attention": ("jvp_flash_attention", jvp_flash_attention),
    "peft": ("peft", peft_lora),
    "torch": ("torch", pytorch),
    "ours": ("torch", ours),
}


def check_peer(rows: Rows, peer: str, cases: dict[str, Case], device: torch.device, directions: int) -> None:
    for name, (fn, inputs) in cases.items():
        report = check_second_order(fn, [x.to(device) for x in inputs], directions=directions)
        for v in report.verdicts:
            if v.mode == REVERSE and v.verdict != "raises":
                rows.add(f"{name} d2/d{v.first} d{v.second}", "second_derivative_relative_error", v.error, "1", peer)
            elif v.verdict in ("raises", "wrong") and v.mode in (FIRST, REVERSE):
                print(f"{peer} {name}: {v}")


def main() -> None:
    args = parser(__doc__).parse_args()
    device = torch.device(args.device)
    if device.type != "cuda":
        sys.path.insert(0, str(ROOT))
        import_module("tests.kernels.interpreter")
    rows = Rows("peers_second_order", device)
    for peer, (package, cases) in PEERS.items():
        if find_spec(package) is None:
            print(f"{peer} is not installed: not checked")
            continue
        check_peer(rows, peer, cases(), device, 1 if args.quick else 3)
    rows.write(args.json)


if __name__ == "__main__":
    main()
