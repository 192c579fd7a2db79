"""The cost of a hypergradient: time against plain LoRA steps, and peak memory against the number of steps N.

    flat            unrolled_sgd: dual passes, one step's activations whatever N is (this project)
    create_graph    the retained graph of all N steps, on transformers' own model with eager attention (MTT's way)
    plain           one LoRA training step: the faster of peft on transformers with SDPA, and our ops

All three compute on the same weights and batches; the two hypergradients are compared before anything is timed. The
model is an OPT of width 512 and 8 layers on 4 x 128 tokens, the last half of each sample supervised. The limit is 3.0
(DESIGN).
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable

import torch
from peft import PeftModel
from timing import Rows, interleaved, median_ratio, parser, quantiles
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from nacd_fast.artifacts import peak_bytes, reset_peak
from nacd_fast.config import ModelConfig
from nacd_fast.student import Student, adapter_parameters, add_lora
from nacd_fast.unroll import unrolled_sgd

FULL = dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, ffn_dim=2048, vocab_size=50272, tokens=128)
QUICK = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, ffn_dim=512, vocab_size=1000, tokens=32)
STEPS, ROUNDS = 4, 9  # inner steps of the timed unroll; rounds of the interleaving
CURVE = {"flat": (2, 4, 8, 16, 32), "create_graph": (1, 2, 4, 8)}
# glibc then maps every tensor by itself and unmaps it when it is freed: resident memory counts live tensors, not holes
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
TOLERANCE = 1e-4  # relative, in float32
PROMPT, BATCH, ALPHA = 2, 4, 0.05


class Problem:
    """One student and its data, and what is measured on them."""

    def __init__(self, quick: bool, device: torch.device, patched: bool):
        size = dict(QUICK if quick else FULL)
        tokens = size.pop("tokens")
        torch.manual_seed(0)
        model = OPTForCausalLM(
            OPTConfig(**size, word_embed_proj_dim=size["hidden_size"], dropout=0.0, activation_function="gelu")
        )
        model = model.to(device).eval().requires_grad_(False)
        self.peft: PeftModel = add_lora(model, ModelConfig(rank=16, lora_alpha=32.0), seed=0)
        self.base = self.peft.get_base_model()
        g = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, size["vocab_size"], (BATCH, tokens), generator=g).to(device)
        self.labels = self.ids.clone()
        self.labels[:, : tokens // 2] = -100
        self.prompts = (0.02 * torch.randn(BATCH, PROMPT, size["hidden_size"], generator=g)).to(device)
        parameters = adapter_parameters(self.peft)
        self.theta = {name: (0.02 * torch.randn(p.shape, generator=g)).to(device) for name, p in parameters.items()}
        self.student = Student(self.peft) if patched else None

    def our_loss(self, theta: dict[str, Tensor], prompts: Tensor) -> Tensor:
        assert self.student is not None
        return self.student.loss(theta, prompts, self.ids, self.labels)

    def their_loss(self, theta: dict[str, Tensor], prompts: Tensor) -> Tensor:
        """transformers' forward and loss, with the adapters passed in."""
        x = torch.cat([prompts, self.base.get_input_embeddings()(self.ids)], 1)
        labels = torch.nn.functional.pad(self.labels, (PROMPT, 0), value=-100)
        return torch.func.functional_call(
            self.peft, theta, kwargs={"inputs_embeds": x, "labels": labels, "use_cache": False}
        ).loss

    def plain_step(self, loss_of: Callable) -> dict[str, Tensor]:
        theta = {name: t.detach().requires_grad_() for name, t in self.theta.items()}
        grads = torch.autograd.grad(loss_of(theta, self.prompts), list(theta.values()))
        return {name: t.detach() - ALPHA * g for (name, t), g in zip(theta.items(), grads, strict=True)}

    def hypergradient(self, steps: int, flat: bool) -> list[Tensor]:
        """d |theta_N|^2 / d (prompts, alpha)."""
        prompts, alpha = (
            self.prompts.clone().requires_grad_(),
            torch.tensor(ALPHA, device=self.prompts.device, requires_grad=True),
        )
        if flat:
            theta = unrolled_sgd(self.our_loss, self.theta, alpha, [prompts] * steps)
        else:
            theta = {name: t.requires_grad_() for name, t in self.theta.items()}
            for _ in range(steps):
                grads = torch.autograd.grad(self.their_loss(theta, prompts), list(theta.values()), create_graph=True)
                theta = {name: t - alpha * g for (name, t), g in zip(theta.items(), grads, strict=True)}
        return list(torch.autograd.grad(sum(t.square().sum() for t in theta.values()), (prompts, alpha)))


def peak_of(mode: str, steps: int, quick: bool, device: torch.device) -> int:
    """Bytes that one hypergradient adds to a process of its own that holds the model."""
    problem = Problem(quick, device, patched=mode == "flat")
    if mode == "create_graph":
        problem.base.set_attn_implementation("eager")
    problem.hypergradient(1, flat=mode == "flat")
    reset_peak()
    before = peak_bytes()
    problem.hypergradient(steps, flat=mode == "flat")
    return peak_bytes() - before


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    rows = Rows("bench_unroll", device)
    case = "opt d128 L2 4x32" if args.quick else "opt d512 L8 4x128"

    ours, theirs = Problem(args.quick, device, patched=True), Problem(args.quick, device, patched=False)
    theirs.base.set_attn_implementation("eager")
    for name, a, b in zip(
        ("prompts", "alpha"), ours.hypergradient(2, flat=True), theirs.hypergradient(2, flat=False), strict=True
    ):
        error = float((a - b).norm() / b.norm())
        rows.add(f"{case} N2 d/d{name}", "relative_error", error, "1", "create_graph")
        if not error <= TOLERANCE:
            sys.exit(f"the hypergradients differ by {error:.2e}, limit {TOLERANCE}: nothing is timed")

    def their_plain_step() -> None:
        theirs.base.set_attn_implementation("sdpa")
        theirs.plain_step(theirs.their_loss)
        theirs.base.set_attn_implementation("eager")

    contestants = {
        "plain, peft and sdpa": their_plain_step,
        "plain, our ops": lambda: ours.plain_step(ours.our_loss),
        "flat": lambda: ours.hypergradient(STEPS, flat=True),
        "create_graph": lambda: theirs.hypergradient(STEPS, flat=False),
    }
    seconds = interleaved(contestants, 3 if args.quick else ROUNDS, device)
    for name, times in seconds.items():
        for quantile, value in zip(("p20", "p50", "p80"), quantiles(times), strict=True):
            rows.add(
                f"{case} {name}",
                f"ms_{quantile}",
                1e3 * value,
                "ms",
                "" if name in ("flat", "plain, our ops") else "transformers",
            )
    plain = [STEPS * min(pair) for pair in zip(seconds["plain, peft and sdpa"], seconds["plain, our ops"], strict=True)]
    rows.add(f"{case} N{STEPS}", "flat_over_plain", median_ratio(seconds["flat"], plain), "x", "")
    rows.add(
        f"{case} N{STEPS}", "create_graph_over_plain", median_ratio(seconds["create_graph"], plain), "x", "create_graph"
    )

    size = sum(t.numel() * t.element_size() for t in ours.theta.values())
    rows.add(case, "theta_bytes", size, "B")
    for mode, counts in CURVE.items():
        for steps in counts[:2] if args.quick else counts:
            command = [sys.executable, __file__, "--peak", mode, str(steps), str(int(args.quick)), args.device]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **GIVE_BACK})
            peak = int(json.loads(done.stdout))
            rows.add(f"{case} N{steps}", "peak_bytes", peak, "B", "" if mode == "flat" else mode)
    rows.write(args.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print(peak_of(sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1", torch.device(sys.argv[5])))
    else:
        main()
