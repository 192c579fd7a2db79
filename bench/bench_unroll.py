"""The cost of a hypergradient: time against plain LoRA steps, and peak memory against the number of steps N.

    flat            unrolled_sgd: dual passes, one step's activations whatever N is (this project)
    retained        unrolled_sgd with every step's graph retained, on the same ops (this project)
    create_graph    the retained graph of all N steps, on transformers' own model with eager attention (MTT's way)
    torchopt        the same by TorchOpt's FuncOptimizer
    higher          the same by higher's differentiable SGD
    plain           N LoRA training steps: the faster of peft on transformers with SDPA, and our ops

All compute on the same weights and batches; the hypergradients are compared before anything is timed. The models are
OPTs, the last half of each sample is supervised. The limits are 3.0 for flat and 2.0 for retained (DESIGN).

While time is measured freed memory stays with the process, for every contestant, as a GPU's caching allocator keeps it;
glibc by itself gives it back to the system and has every page made anew, 0.75 ms a MB where these rows were measured.
Each timed run follows an untimed one of the same contestant, which brings back what the system took meanwhile.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from timing import Rows, interleaved, median_ratio, parser, quantiles
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from nacd_fast.artifacts import peak_bytes, reset_peak
from nacd_fast.config import ModelConfig
from nacd_fast.data import Encoded, pack
from nacd_fast.student import Student, adapter_parameters, add_lora
from nacd_fast.unroll import unrolled_sgd


class Shape(NamedTuple):
    """A student and a batch; the inner steps and rounds of the timed unrolls; the steps of the memory curves."""

    width: int
    layers: int
    batch: int
    tokens: int
    vocabulary: int
    steps: int
    rounds: int
    flat_curve: tuple[int, ...]
    graph_curve: tuple[int, ...]


FULL = {
    "opt d512 L8 4x128": Shape(512, 8, 4, 128, 50272, 4, 3, (2, 8, 32), (1, 4, 8)),
    "opt d768 L12 2x512": Shape(768, 12, 2, 512, 50272, 2, 3, (2,), (2,)),
}
QUICK = {"opt d128 L2 4x32": Shape(128, 2, 4, 32, 1000, 4, 3, (2, 4), (1, 2))}
# how glibc treats freed memory. Kept for what is timed; given back where it is measured: every tensor is then mapped by
# itself and unmapped when it is freed, and resident memory counts live tensors, not holes
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
TOLERANCE = 1e-4  # relative, in float32
PROMPT, ALPHA = 2, 0.05
OURS = ("flat", "retained")
PEERS = ("create_graph", *(name for name in ("torchopt", "higher") if find_spec(name)))

Params = dict[str, Tensor]


class Problem:
    """One student and its data, and what is measured on them."""

    def __init__(self, shape: Shape, device: torch.device, patched: bool):
        torch.manual_seed(0)
        width = shape.width
        sizes = dict(hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, num_hidden_layers=shape.layers)
        config = OPTConfig(
            **sizes,
            num_attention_heads=width // 64 if width >= 512 else 4,
            vocab_size=shape.vocabulary,
            max_position_embeddings=shape.tokens + PROMPT,
            dropout=0.0,
            activation_function="gelu",
        )
        model = OPTForCausalLM(config).to(device).eval().requires_grad_(False)
        self.peft: PeftModel = add_lora(model, ModelConfig(rank=16, lora_alpha=32.0), seed=0)
        self.base = self.peft.get_base_model()
        g = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, shape.vocabulary, (shape.batch, shape.tokens), generator=g)
        self.labels = self.ids.clone()
        self.labels[:, : shape.tokens // 2] = -100
        rows = [Encoded(*pair) for pair in zip(self.ids.tolist(), self.labels.tolist(), strict=True)]
        self.batch = pack(rows, PROMPT).to(device)
        self.ids, self.labels = self.ids.to(device), self.labels.to(device)
        self.prompts = (0.02 * torch.randn(shape.batch, PROMPT, width, generator=g)).to(device)
        parameters = adapter_parameters(self.peft)
        self.theta = {name: (0.02 * torch.randn(p.shape, generator=g)).to(device) for name, p in parameters.items()}
        self.student = Student(self.peft) if patched else None

    def our_loss(self, theta: Params, prompts: Tensor, retain: bool = False) -> Tensor:
        assert self.student is not None
        return self.student.loss(theta, prompts, self.batch, retain=retain)

    def their_loss(self, theta: Params, prompts: Tensor) -> Tensor:
        """transformers' forward and loss, with the adapters passed in."""
        x = torch.cat([prompts, self.base.get_input_embeddings()(self.ids)], 1)
        labels = torch.nn.functional.pad(self.labels, (PROMPT, 0), value=-100)
        return torch.func.functional_call(
            self.peft, theta, kwargs={"inputs_embeds": x, "labels": labels, "use_cache": False}
        ).loss

    def plain_steps(self, loss_of: Callable, steps: int) -> None:
        theta = self.theta
        for _ in range(steps):
            theta = {name: t.detach().requires_grad_() for name, t in theta.items()}
            grads = torch.autograd.grad(loss_of(theta, self.prompts), list(theta.values()))
            theta = {name: t.detach() - ALPHA * g for (name, t), g in zip(theta.items(), grads, strict=True)}

    def hypergradient(self, mode: str, steps: int) -> list[Tensor]:
        """d |theta_N|^2 / d (prompts, alpha)."""
        prompts = self.prompts.clone().requires_grad_()
        alpha = torch.tensor(ALPHA, device=prompts.device, requires_grad=True)
        if mode in OURS:
            retain = steps if mode == "retained" else 0

            def inner_loss(theta: Params, prompts: Tensor) -> Tensor:
                return self.our_loss(theta, prompts, retain=retain > 0)

            theta = unrolled_sgd(inner_loss, self.theta, alpha, [prompts] * steps, retain=retain)
        else:
            theta = {name: t.detach().requires_grad_() for name, t in self.theta.items()}
            step = PEER_STEPS[mode](theta, alpha)
            for _ in range(steps):
                theta = step(self.their_loss(theta, prompts), theta)
        size = torch.stack([t.square().sum() for t in theta.values()]).sum()
        return list(torch.autograd.grad(size, (prompts, alpha)))


def create_graph_step(theta: Params, alpha: Tensor) -> Callable[[Tensor, Params], Params]:
    def step(loss: Tensor, theta: Params) -> Params:
        grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        return {name: t - alpha * g for (name, t), g in zip(theta.items(), grads, strict=True)}

    return step


def torchopt_step(theta: Params, alpha: Tensor) -> Callable[[Tensor, Params], Params]:
    import torchopt

    optimizer: Any = torchopt.FuncOptimizer(torchopt.sgd(lr=alpha))
    return optimizer.step


def higher_step(theta: Params, alpha: Tensor) -> Callable[[Tensor, Params], Params]:
    import higher

    leaves = list(theta.values())
    optimizer = higher.get_diff_optim(torch.optim.SGD(leaves, lr=ALPHA), leaves, override={"lr": [alpha]})

    def step(loss: Tensor, theta: Params) -> Params:
        return dict(zip(theta, optimizer.step(loss, params=list(theta.values())), strict=True))

    return step


PEER_STEPS: dict[str, Callable[[Params, Tensor], Callable[[Tensor, Params], Params]]] = {
    "create_graph": create_graph_step,
    "torchopt": torchopt_step,
    "higher": higher_step,
}


def peak_of(mode: str, steps: int, shape: Shape, device: torch.device) -> int:
    """Bytes that one hypergradient adds to a process of its own that holds the model."""
    problem = Problem(shape, device, patched=mode in OURS)
    if mode not in OURS:
        problem.base.set_attn_implementation("eager")
    problem.hypergradient(mode, 1)
    reset_peak()
    before = peak_bytes()
    problem.hypergradient(mode, steps)
    return peak_bytes() - before


def peer_of(name: str) -> str:
    return "transformers" if name == "plain, peft and sdpa" else name if name in PEERS else ""


def compare(case: str, ours: Problem, theirs: Problem, rows: Rows) -> None:
    """Stops the bench where two of the contestants compute different things."""
    want = theirs.hypergradient("create_graph", 2)
    for mode in (*OURS, *PEERS[1:]):
        problem = ours if mode in OURS else theirs
        for name, a, b in zip(("prompts", "alpha"), problem.hypergradient(mode, 2), want, strict=True):
            error = float((a - b).norm() / b.norm())
            rows.add(f"{case} N2 {mode} d/d{name}", "relative_error", error, "1", "create_graph")
            if not error <= TOLERANCE:
                sys.exit(f"{mode}: d/d{name} is {error:.2e} off create_graph, limit {TOLERANCE}: nothing is timed")


def bench(case: str, shape: Shape, rows: Rows, device: torch.device) -> None:
    ours, theirs = Problem(shape, device, patched=True), Problem(shape, device, patched=False)
    theirs.base.set_attn_implementation("eager")
    compare(case, ours, theirs, rows)

    def their_plain_steps() -> None:
        theirs.base.set_attn_implementation("sdpa")
        theirs.plain_steps(theirs.their_loss, shape.steps)
        theirs.base.set_attn_implementation("eager")

    contestants: dict[str, Callable[[], object]] = {
        "plain, peft and sdpa": their_plain_steps,
        "plain, our ops": lambda: ours.plain_steps(ours.our_loss, shape.steps),
    }
    for mode in (*OURS, *PEERS):
        contestants[mode] = partial((ours if mode in OURS else theirs).hypergradient, mode, shape.steps)
    seconds = interleaved(contestants, shape.rounds, device, warmup=0, twice=True)
    for name, times in seconds.items():
        for quantile, value in zip(("p20", "p50", "p80"), quantiles(times), strict=True):
            rows.add(f"{case} N{shape.steps} {name}", f"ms_{quantile}", 1e3 * value, "ms", peer_of(name))
    pairs = zip(seconds["plain, peft and sdpa"], seconds["plain, our ops"], strict=True)
    plain = [min(pair) for pair in pairs]
    for mode in (*OURS, *PEERS):
        rows.add(f"{case} N{shape.steps}", f"{mode}_over_plain", median_ratio(seconds[mode], plain), "x", peer_of(mode))
    rows.add(case, "theta_bytes", sum(t.numel() * t.element_size() for t in ours.theta.values()), "B")


def curves(case: str, shape: Shape, rows: Rows, device: torch.device) -> None:
    """Peak memory against N, each in a process of its own."""
    for mode in (*OURS, *PEERS):
        for steps in shape.flat_curve if mode == "flat" else shape.graph_curve:
            command = [sys.executable, __file__, "--peak", mode, str(steps), case, str(device)]
            env = {name: value for name, value in os.environ.items() if name not in KEEP} | GIVE_BACK
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
            rows.add(f"{case} N{steps}", "peak_bytes", int(json.loads(done.stdout)), "B", mode)


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    rows = Rows("bench_unroll", device)
    for name in sorted({"torchopt", "higher"} - set(PEERS)):
        print(f"{name} is not installed: no rows of it")
    for case, shape in (QUICK if args.quick else FULL).items():
        bench(case, shape, rows, device)
        curves(case, shape, rows, device)
    rows.write(args.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print(peak_of(sys.argv[2], int(sys.argv[3]), (FULL | QUICK)[sys.argv[4]], torch.device(sys.argv[5])))
    elif not KEEP.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})  # glibc reads it at the start
    else:
        main()
