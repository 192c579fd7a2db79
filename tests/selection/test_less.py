"""LESS: each step against an oracle, the whole against retraining without a sample, killed and resumed."""

import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nacd_fast.artifacts import folder_digest, write_atomic, write_json
from nacd_fast.config import DataConfig, LessConfig, SelectConfig
from nacd_fast.data import collate, encode_set, pack
from nacd_fast.errors import InputError, NonFiniteError
from nacd_fast.examples import Example
from nacd_fast.losses import mean_nll
from nacd_fast.selection import check, features, less, select
from nacd_fast.selection.features import Store
from nacd_fast.selection.gradients import SampleGradients
from nacd_fast.selection.method import Context
from nacd_fast.selection.projection import Projection
from nacd_fast.selection.random import draws
from nacd_fast.student import Student, adapter_parameters, add_lora, load_adapter_state, load_model
from nacd_fast.training import Batches, Samples
from tests.oracle import exact, plain_loss
from tests.selection.pools import context, spoken
from tests.tiny import at_call, kill_self, make_examples, make_model, run_killed, tree_digests

LESS = LessConfig(warmup_fraction=0.5, warmup_epochs=2, warmup_batch=3, warmup_lr=1e-2, dimensions=128, batch=4)
POOL, TARGET = make_examples(13), [*make_examples(3, 1), *spoken("why|river", "why|a dog", source="other")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def finished(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Context, Any]:
    """A whole selection, and what it was given."""
    given = context(TARGET, model, tmp_path_factory.mktemp("store"))
    return given, select(POOL, SelectConfig(method="less", target="t", fraction=0.3, less=LESS), 5, given)


# --- the warm-up ------------------------------------------------------------------------------------------------------


def test_checkpoints_hold_what_adamw_had(finished: tuple[Context, Any]) -> None:
    """The warm-up against a plain loop: torch's AdamW, the linear schedule by hand, transformers' own loss."""
    given, _ = finished
    schedule = json.loads((given.store / "warmup" / "schedule.json").read_text())
    assert schedule["adam"] == {"betas": [0.9, 0.999], "eps": 1e-8} and schedule["steps_per_epoch"] == 2
    factors = [0.0, 1.0, 2 / 3, 1 / 3]  # of 4 steps, the first of which is the rise
    assert schedule["rates"] == pytest.approx([1e-2 * sum(factors[:2]) / 2, 1e-2 * sum(factors[2:]) / 2])
    kept = sorted(sorted(range(13), key=lambda i: -draws(13, 5)[i])[:6])
    base, tokenizer = load_model(given.model.path, device="cpu")
    model = add_lora(base, given.model, 5)
    rows = encode_set([POOL[i] for i in kept], tokenizer, given.data)
    batches = Batches(Samples([POOL[i].id for i in kept], rows), 3, 4, 5, 0)
    parameters = adapter_parameters(model)
    rule = torch.optim.AdamW(parameters.values(), weight_decay=0.0)
    for step, factor in enumerate(factors):
        rule.param_groups[0]["lr"] = 1e-2 * factor
        rule.zero_grad()
        batch = collate([rows[i] for i in batches.indices(step)], 0)
        logits = base(batch["input_ids"]).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
        rule.step()
        if step % 2:
            found = load_file(given.store / "warmup" / f"checkpoint{step // 2 + 1}.safetensors")
            assert len(found) == 3 * len(parameters)
            for name, p in parameters.items():
                torch.testing.assert_close(found[f"adapter.{name}"], p.detach(), rtol=1e-4, atol=1e-5)
                for moment in less.MOMENTS:
                    torch.testing.assert_close(found[f"{moment}.{name}"], rule.state[p][moment], rtol=1e-3, atol=1e-7)


def test_mean_rates_rise_and_fall_linearly() -> None:
    rates = less.mean_rates(1.0, 200, 50)
    factors = [s / 6 if s < 6 else (200 - s) / 194 for s in range(200)]
    assert rates == pytest.approx([np.mean(factors[at : at + 50]) for at in (0, 50, 100, 150)])


# --- against the definition, in float64 -------------------------------------------------------------------------------


def adamw_step(g: Tensor, moments: Sequence[Tensor], steps: int) -> Tensor:
    """What torch's AdamW would subtract next, at the learning rate 1."""
    p = torch.nn.Parameter(torch.zeros_like(g))
    rule = torch.optim.AdamW([p], lr=1.0, weight_decay=0.0)
    rule.state[p] = {
        "step": torch.tensor(float(steps)),
        "exp_avg": moments[0].clone(),
        "exp_avg_sq": moments[1].clone(),
    }
    p.grad = g.clone()
    rule.step()
    return -p.detach()


@pytest.mark.parametrize("steps", [1, 7])
def test_adam_steps_are_those_of_torch(steps: int) -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 30, generator=g, dtype=torch.float64) * torch.tensor([[1e-9, 1e-3, 1.0, 0.0]]).T
    moments = [
        0.1 * torch.randn(30, generator=g, dtype=torch.float64),
        torch.rand(30, generator=g, dtype=torch.float64),
    ]
    moments[1][:5] = 1e-18  # where epsilon counts
    moments[0][:5] = 1e-9
    want = torch.stack([adamw_step(row, moments, steps) for row in rows])
    found = less.adam_steps(rows.clone(), moments, {"betas": [0.9, 0.999], "eps": 1e-8}, steps)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-14)


def named(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name[len(kind) + 1 :]: t.double() for name, t in sorted(tensors.items()) if name.startswith(kind + ".")}


def oracle_scores(given: Context, pool: Sequence[Example], target: Sequence[Example]) -> np.ndarray:
    """Influence by the definition: per-sample torch.func gradients, the whole projection, everything in float64."""
    base, tokenizer = load_model(given.model.path, device="cpu")
    oracle = exact(add_lora(base.double(), given.model, 0).double())
    rows = {name: encode_set(examples, tokenizer, given.data) for name, examples in (("p", pool), ("t", target))}
    schedule = json.loads((given.store / "warmup" / "schedule.json").read_text())
    total = np.zeros((len(pool), 2))
    for number, rate in enumerate(schedule["rates"], 1):
        tensors = load_file(given.store / "warmup" / f"checkpoint{number}.safetensors")
        adapters = named(tensors, "adapter")
        moments = [torch.cat([t.flatten() for t in named(tensors, kind).values()]) for kind in less.MOMENTS]

        def gradient(row: Any, adapters: dict[str, Tensor] = adapters) -> Tensor:
            prompts = torch.zeros(1, 0, base.config.hidden_size, dtype=torch.float64)
            grads = torch.func.grad(lambda a: plain_loss(oracle, a, prompts, [row]))(adapters)
            return torch.cat([grads[name].flatten() for name in adapters])

        whole = Projection(LESS.dimensions, 5, torch.device("cpu"), torch.float64)
        whole.room = torch.empty(len(moments[0]) * whole.d // 8, 8, dtype=torch.float64)
        s = whole.signs(0, len(moments[0])).clone()
        steps = number * schedule["steps_per_epoch"]
        at_pool = torch.stack([adamw_step(gradient(row), moments, steps) for row in rows["p"]]) @ s
        at_target = torch.stack([gradient(row) for row in rows["t"]]) @ s
        cosines = torch.nn.functional.normalize(at_pool) @ torch.nn.functional.normalize(at_target).T
        means = torch.stack([cosines[:, :3].mean(1), cosines[:, 3:].mean(1)], 1)
        total += (rate / sum(schedule["rates"]) * means).numpy()
    return total.max(1)


class Exact(Store):
    """Features in float64, in memory."""

    def __init__(self, rows: dict[int, Tensor]):
        self.rows, self.n = rows, len(rows[1])

    def unit_rows(self, checkpoint: int, start: int, stop: int) -> Tensor:
        return torch.nn.functional.normalize(self.rows[checkpoint][start:stop], dim=1)


def test_influence_is_that_of_the_definition_in_float64(finished: tuple[Context, Any]) -> None:
    given, _ = finished
    base, tokenizer = load_model(given.model.path, device="cpu")
    student = Student(add_lora(base.double(), given.model, 0).double())
    gradients, project = SampleGradients(student), Projection(LESS.dimensions, 5, torch.device("cpu"), torch.float64)
    schedule = json.loads((given.store / "warmup" / "schedule.json").read_text())
    stores: list[dict[int, Tensor]] = [{}, {}]
    for number in (1, 2):
        tensors = load_file(given.store / "warmup" / f"checkpoint{number}.safetensors")
        theta, *moments = (
            torch.cat([t.flatten() for t in named(tensors, kind).values()]) for kind in ("adapter", *less.MOMENTS)
        )
        for store, examples in zip(stores, (POOL, TARGET)):
            batch = pack(encode_set(examples, tokenizer, given.data), 0)
            out = gradients(theta, batch, torch.empty(len(examples), len(theta), dtype=torch.float64))
            if store is stores[0]:
                less.adam_steps(out, moments, schedule["adam"], number * schedule["steps_per_epoch"])
            store[number] = project(out)
    found = less.influence(Exact(stores[0]), Exact(stores[1]), [[0, 1, 2], [3, 4]], schedule["rates"])
    np.testing.assert_allclose(found, oracle_scores(given, POOL, TARGET), atol=1e-6)


def test_a_whole_selection_is_near_the_definition(finished: tuple[Context, Any]) -> None:
    """float32 gradients and float16 features."""
    given, found = finished
    want = oracle_scores(given, POOL, TARGET)
    np.testing.assert_allclose(found.scores, want, atol=2e-3)
    assert found.ids == [POOL[i].id for i in sorted(np.argsort(-np.array(found.scores), kind="stable")[:4])]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    first, second = (np.argsort(np.argsort(v)) for v in (x, y))
    return float(np.corrcoef(first, second)[0, 1])


def test_the_ranking_is_that_of_leaving_a_sample_out(model: str, tmp_path: Path) -> None:
    """Retraining without a sample: how much worse the target's loss becomes, against the sample's score."""
    near = spoken(*(f"why is the {a} {b}|over the river" for a in ("cat", "dog", "stone") for b in ("green", "small")))
    far = spoken(
        *(f"where {a} {b}|it sleeps" for a in ("cat", "dog", "stone") for b in ("green", "small")), source="far"
    )
    pool, target = [*near, *far], spoken("why is a river green|over the river", "why is the stone|over the river")
    config = LessConfig(
        warmup_fraction=1, warmup_epochs=4, warmup_batch=len(pool), warmup_lr=2e-2, dimensions=1024, batch=4
    )
    given = context(target, model, tmp_path / "store", rank=4)
    scores = select(pool, SelectConfig(method="less", target="t", less=config), 0, given).scores

    def loss_without(left_out: int) -> float:
        rest = [e for i, e in enumerate(pool) if i != left_out]
        alone = LessConfig(**{**vars(config), "warmup_batch": len(rest)})
        less.warm_up(tmp_path / f"without{left_out}", rest, alone, 0, given)
        base, tokenizer = load_model(model, device="cpu")
        peft = add_lora(base, given.model, 0)
        state = load_file(tmp_path / f"without{left_out}" / "checkpoint4.safetensors")
        load_adapter_state(peft, less.named(state, "adapter"))
        return mean_nll(peft, encode_set(target, tokenizer, DataConfig()), 8, 0)

    worse = np.array([loss_without(i) for i in range(len(pool))])
    assert spearman(np.array(scores), worse) > 0.5


# --- the store --------------------------------------------------------------------------------------------------------


def test_half_precision_rows_keep_eleven_bits_of_any_size() -> None:
    y = (
        torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
        * torch.tensor([[1e-20, 1e-6, 1, 3e4, 1e20, 0]]).T
    )
    half, exponents = features.to_half(y)
    again = half.astype(np.float64) * 2.0 ** exponents[:, None].astype(np.float64)
    assert half.dtype == np.float16 and exponents.dtype == np.int16
    largest = y.abs().amax(1).double().numpy()[:, None]
    assert (np.abs(again - y.double().numpy()) <= largest * 2.0**-11).all()


def test_unnormalised_features_are_stored(finished: tuple[Context, Any]) -> None:
    pool = finished[0].store / "pool"
    rows, exponents = np.load(pool / "features2.npy"), np.load(pool / "exponents2.npy")
    assert rows.shape == (13, 128) and rows.dtype == np.float16 and exponents.shape == (13,)
    lengths = np.linalg.norm(rows.astype(np.float64) * 2.0 ** exponents[:, None].astype(np.float64), axis=1)
    assert lengths.std() > 0.01 * lengths.mean() and lengths.mean() > 2


def test_a_second_target_reuses_warm_up_and_pool(
    finished: tuple[Context, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, first = finished
    before = tree_digests(given.store)
    other = Context(TARGET[3:], given.model, given.data, given.store)
    monkeypatch.setattr(less, "train", kill_self)
    found = select(POOL, SelectConfig(method="less", target="t", fraction=0.3, less=LESS), 5, other)
    after = tree_digests(given.store)
    assert before.items() <= after.items() and len({name.split("/")[0] for name in after}) == 4
    assert found.scores != first.scores


DEATHS = {
    "in the warm-up": lambda patch: patch.setattr(less, "write_atomic", at_call(1, write_atomic)),
    "in the first shard": lambda patch: patch.setattr(features, "to_half", at_call(0, features.to_half)),
    "in a later shard": lambda patch: patch.setattr(features, "to_half", at_call(7, features.to_half)),
    "before a shard counts": lambda patch: patch.setattr(features, "write_json", at_call(3, write_json)),
    "in the target": lambda patch: patch.setattr(features, "to_half", at_call(11, features.to_half)),
}


@pytest.mark.parametrize("death", DEATHS)
def test_killed_and_resumed_ends_with_the_same_bytes(
    death: str, finished: tuple[Context, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, found = finished
    given = Context(TARGET, whole.model, whole.data, tmp_path / "store")
    config = SelectConfig(method="less", target="t", fraction=0.3, less=LESS)
    monkeypatch.setattr(less, "SHARD", 3)
    with monkeypatch.context() as patch:
        DEATHS[death](patch)
        run_killed(lambda: select(POOL, config, 5, given))
    assert any((tmp_path / "store").rglob("work"))
    again = select(POOL, config, 5, given)
    assert again.ids == found.ids
    np.testing.assert_allclose(again.scores, found.scores, atol=1e-4)  # of shards of another size
    uninterrupted = Context(TARGET, whole.model, whole.data, tmp_path / "uninterrupted")
    assert select(POOL, config, 5, uninterrupted) == again
    for part in ("warmup", "pool"):
        assert folder_digest(tmp_path / "store" / part) == folder_digest(tmp_path / "uninterrupted" / part)


def test_a_changed_byte_of_the_store_is_seen(finished: tuple[Context, Any], tmp_path: Path) -> None:
    given = Context(TARGET, finished[0].model, finished[0].data, tmp_path / "store")
    shutil.copytree(finished[0].store, given.store)
    path = given.store / "pool" / "features1.npy"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"features1\.npy: changed since its stage was finished"):
        select(POOL, SelectConfig(method="less", target="t", less=LESS), 5, given)


def test_a_gradient_that_is_not_finite_names_its_sample(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = less.adam_steps

    def spoiled(gradients: Tensor, *rest: Any) -> Tensor:
        plain(gradients, *rest)[2] = torch.nan
        return gradients

    monkeypatch.setattr(less, "adam_steps", spoiled)
    with pytest.raises(NonFiniteError, match="the gradient of sample 'x0-2' at checkpoint 1 is not finite"):
        select(POOL, SelectConfig(method="less", target="t", less=LESS), 5, context(TARGET, model, tmp_path))


def test_a_full_disk_is_an_error_before_anything_is_mapped(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    given, config = context(TARGET, model, tmp_path), SelectConfig(method="less", target="t", less=LESS)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            select(POOL, config, 5, given)
    assert not (tmp_path / "pool" / "manifest.json").exists()
    assert len(select(POOL, config, 5, given).scores) == 13
    size = (tmp_path / "pool" / "features1.npy").stat()
    assert size.st_blocks * 512 >= size.st_size  # no holes


def test_what_check_refuses(model: str) -> None:
    config = SelectConfig(method="less", target="t", less=LessConfig(warmup_fraction=0.1))
    with pytest.raises(InputError, match=r"the warm-up's set has 1 samples, fewer than less\.warmup_batch=32"):
        check(POOL, config, context(TARGET, model))
    with pytest.raises(InputError, match=r"select\.target: the target is empty"):
        check(POOL, config, context((), model))
