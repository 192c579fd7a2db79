"""The trainer against loops written by hand, its order of samples, resume, and bad numbers."""

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from nacd_fast import training
from nacd_fast.config import DataConfig, ModelConfig
from nacd_fast.data import Encoded, collate, encode_set
from nacd_fast.errors import InputError, NonFiniteError
from nacd_fast.losses import base_model, token_losses
from nacd_fast.student import adapter_parameters, adapter_state, add_lora, load_adapter_state, load_model
from nacd_fast.training import MARKER, Batches, Observer, Samples
from tests.tiny import make_examples, make_model

PAD = 0


class Keep(Observer):
    """Snapshots of every step; `end` raises after that step, as Ctrl-C would."""

    def __init__(self, model: PeftModel, end: int = 10**9):
        self.model, self.end, self.began = model, end, -1
        self.states: dict[int, dict[str, Tensor]] = {}

    def begin(self, step: int) -> None:
        self.began = step

    def after(self, step: int) -> None:
        self.states[step] = adapter_state(self.model)
        if step == self.end:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {family: make_model(tmp_path_factory.mktemp(family), family) for family in ("llama", "opt")}


def student(path: str, seed: int = 0) -> PeftModel:
    """A student whose B is not zero, so that A has a gradient from the first step."""
    config = ModelConfig(path=path, rank=4, device="cpu")
    model = add_lora(load_model(path, "float32", "cpu")[0], config, seed)
    generator = torch.Generator().manual_seed(seed + 100)
    load_adapter_state(
        model,
        {
            name: t + 0.1 * torch.randn(t.shape, generator=generator) * (".lora_B." in name)
            for name, t in adapter_state(model).items()
        },
    )
    return model


def make_samples(path: str, n: int = 22) -> Samples:
    examples = make_examples(n)
    return Samples([e.id for e in examples], encode_set(examples, load_model(path)[1], DataConfig(max_tokens=48)))


def train(
    model: PeftModel, samples: Samples, work: Path, observer: Observer | None = None, **change: Any
) -> list[float]:
    settings: dict[str, Any] = {
        "optimizer": "adamw",
        "lr": 1e-2,
        "batch": 4,
        "steps": 12,
        "seed": 3,
        "pad_id": PAD,
        "work": work,
        "label": "test",
    }
    return training.train(model, samples, observer=observer or Observer(), **{**settings, **change})


def own_loss(model: PeftModel, rows: list[Encoded]) -> Tensor:
    """The loss that the model itself computes, with an attention mask."""
    batch = collate(rows, PAD)
    mask = torch.tensor([[i < len(row.input_ids) for i in range(batch["input_ids"].shape[1])] for row in rows])
    return model(**batch, attention_mask=mask.long()).loss


# Loops written by hand


def by_hand(
    model: PeftModel, samples: Samples, optimizer: str, lr: float, batch: int, steps: int, seed: int
) -> tuple[list[dict[str, Tensor]], float]:
    """States after every step, and the largest gradient norm."""
    order = Batches(samples, batch, steps, seed, PAD)
    parameters = list(adapter_parameters(model).values())
    m, v = [torch.zeros_like(p) for p in parameters], [torch.zeros_like(p) for p in parameters]
    norms, states = [], []
    model.train()  # without dropout this is the same as eval
    for step in range(1, steps + 1):
        loss = own_loss(model, [samples.rows[i] for i in order.indices(step - 1)])
        gradients = torch.autograd.grad(loss, parameters)
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
                m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g * g
                scaled = (m[i] / (1 - 0.9**step)) / ((v[i] / (1 - 0.999**step)).sqrt() + 1e-8)
                p.sub_(lr * (g if optimizer == "sgd" else scaled))
        states.append(adapter_state(model))
    return states, max(norms)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.02), ("adamw", 1e-3)])
def test_one_epoch_equals_a_loop_by_hand(
    tmp_path: Path, paths: dict[str, str], family: str, optimizer: str, lr: float
) -> None:
    samples = make_samples(paths[family])
    steps = math.ceil(len(samples.rows) / 4)
    states, norm = by_hand(student(paths[family]), samples, optimizer, lr, 4, steps, seed=3)
    assert norm > 1, "clipping at the Trainer's default of 1 would not show"
    model = student(paths[family])
    observer = Keep(model)
    train(model, samples, tmp_path, observer, optimizer=optimizer, lr=lr, steps=steps)
    assert sorted(observer.states) == [*range(1, steps + 1)] and observer.began == 0
    for step, expected in enumerate(states, 1):
        for name, value in observer.states[step].items():
            assert (value - expected[name]).abs().max() <= 1e-6, f"step {step}, {name}"


def test_losses_are_those_before_the_updates(tmp_path: Path, paths: dict[str, str]) -> None:
    samples, model = make_samples(paths["llama"]), student(paths["llama"])
    first = Batches(samples, 4, 3, 3, PAD)[0]
    expected = token_losses(base_model(model), **first).mean().item()
    losses = train(model, samples, tmp_path, steps=3)
    assert len(losses) == 3 and losses[0] == expected


def test_only_the_adapters_change(tmp_path: Path, paths: dict[str, str]) -> None:
    model = student(paths["llama"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model, make_samples(paths["llama"]), tmp_path, steps=2)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(adapter_parameters(model))
    assert all(p.dtype == torch.float32 for p in adapter_parameters(model).values())


def test_adapters_stay_float32_on_a_bfloat16_base(tmp_path: Path, paths: dict[str, str]) -> None:
    config = ModelConfig(path=paths["llama"], rank=4, device="cpu", dtype="bfloat16")
    model = add_lora(load_model(config.path, config.dtype, "cpu")[0], config, 0)
    losses = train(model, make_samples(paths["llama"]), tmp_path, steps=30)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    assert sum(losses[-5:]) < sum(losses[:5])


# Order


def test_batches() -> None:
    samples = Samples([str(i) for i in range(11)], [Encoded([i, i], [-100, i]) for i in range(11)])
    batches = Batches(samples, 4, 9, seed=5, pad_id=PAD)
    steps = [batches.indices(step) for step in range(9)]
    assert [len(b) for b in steps] == [4, 4, 3] * 3 and len(batches) == 9
    epochs = [[i for step in steps[e * 3 : e * 3 + 3] for i in step] for e in range(3)]
    assert all(sorted(epoch) == [*range(11)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert [Batches(samples, 4, 9, 5, PAD).indices(s) for s in (7, 0, 4)] == [steps[s] for s in (7, 0, 4)]
    assert Batches(samples, 4, 9, 6, PAD).indices(0) != steps[0]
    assert batches[1]["input_ids"][:, 0].tolist() == steps[1]


def test_prompts_go_with_their_samples() -> None:
    rows = [Encoded([i, i], [-100, i]) for i in range(7)]
    samples = Samples([str(i) for i in range(7)], rows, torch.arange(7.0)[:, None, None].expand(7, 2, 3))
    batch = Batches(samples, 3, 3, 0, PAD)[2]
    assert batch["prompts"].shape == (1, 2, 3)
    assert batch["prompts"][:, 0, 0].tolist() == batch["input_ids"][:, 0].tolist()


# Resume


@pytest.fixture
def saving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)


@pytest.mark.usefixtures("saving")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_resume_goes_on_with_the_same_bits(
    tmp_path: Path, paths: dict[str, str], optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, whole = make_samples(paths["llama"]), student(paths["llama"])
    losses = train(whole, samples, tmp_path / "whole", optimizer=optimizer)
    first = student(paths["llama"])
    with pytest.raises(KeyboardInterrupt):
        train(first, samples, tmp_path / "work", Keep(first, end=8), optimizer=optimizer)
    assert [p.name for p in (tmp_path / "work").glob("checkpoint-*")] == ["checkpoint-7"]

    loads: list[Any] = []
    load = torch.load

    def noted_load(*args: Any, **kwargs: Any) -> Any:
        loads.append(kwargs.get("weights_only"))
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", noted_load)
    second = student(paths["llama"])
    observer = Keep(second)
    assert train(second, samples, tmp_path / "work", observer, optimizer=optimizer) == losses
    assert observer.began == 7 and sorted(observer.states) == [8, 9, 10, 11, 12]
    assert len(loads) >= 2 and set(loads) == {True}, "pickles must never be trusted"
    for name, value in adapter_state(whole).items():
        assert torch.equal(value, adapter_state(second)[name]), name


@pytest.mark.usefixtures("saving")
def test_a_finished_training_is_not_repeated(tmp_path: Path, paths: dict[str, str]) -> None:
    samples, model = make_samples(paths["llama"]), student(paths["llama"])
    losses = train(model, samples, tmp_path)
    again = student(paths["llama"])
    observer = Keep(again)
    assert train(again, samples, tmp_path, observer) == losses
    assert observer.began == 12 and not observer.states
    for name, value in adapter_state(model).items():
        assert torch.equal(value, adapter_state(again)[name]), name


@pytest.mark.usefixtures("saving")
@pytest.mark.parametrize("damage", ["no marker", "half a marker", "wrong marker", "cut", "missing", "changed"])
def test_a_torn_checkpoint_is_passed_over(tmp_path: Path, paths: dict[str, str], damage: str) -> None:
    samples, model = make_samples(paths["llama"]), student(paths["llama"])
    train(model, samples, tmp_path / "work", steps=3)
    newest = tmp_path / "work" / "checkpoint-3"
    older = tmp_path / "work" / "checkpoint-2"
    assert training.last_checkpoint(tmp_path / "work") == newest
    shutil.copytree(newest, older)  # whole by its own marker
    if damage == "no marker":
        (newest / MARKER).unlink()
    elif damage == "half a marker":
        (newest / MARKER).write_bytes((newest / MARKER).read_bytes()[:40])
    elif damage == "wrong marker":
        (newest / MARKER).write_text("[]")
    elif damage == "missing":
        (newest / "optimizer.pt").unlink()
    else:
        data = (newest / "optimizer.pt").read_bytes()
        (newest / "optimizer.pt").write_bytes(data[:-9] if damage == "cut" else data[:200] + b"\1" + data[201:])
    assert training.last_checkpoint(tmp_path / "work") == older
    assert not newest.exists()
    shutil.rmtree(older)
    assert training.last_checkpoint(tmp_path / "work") is None


@pytest.mark.usefixtures("saving")
def test_a_checkpoint_holds_no_pickled_objects(tmp_path: Path, paths: dict[str, str]) -> None:
    train(student(paths["llama"]), make_samples(paths["llama"]), tmp_path, steps=2)
    names = {p.name for p in (tmp_path / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in names and "training_args.bin" not in names
    for name in names:
        if name.endswith((".pt", ".pth")) and name != "rng_state.pth":  # numpy's state needs an allow-list
            torch.load(tmp_path / "checkpoint-2" / name, weights_only=True)


# Bad numbers


@pytest.fixture
def poisoned(paths: dict[str, str]) -> Iterator[tuple[PeftModel, Samples]]:
    """One sample holds a token whose embedding is NaN."""
    model, samples = student(paths["llama"]), make_samples(paths["llama"])
    token = 999
    rows = [*samples.rows]
    rows[13] = replace(rows[13], input_ids=[token, *rows[13].input_ids[1:]])
    table: Any = base_model(model).get_input_embeddings()
    with torch.no_grad():
        table.weight[token] = math.nan
    assert sum(token in row.input_ids for row in rows) == 1
    yield model, replace(samples, rows=rows)


def test_a_bad_loss_stops_at_once(tmp_path: Path, poisoned: tuple[PeftModel, Samples]) -> None:
    model, samples = poisoned
    order = Batches(samples, 4, 12, 3, PAD)
    step = next(s for s in range(12) if 13 in order.indices(s))
    assert step > 0
    observer = Keep(model)
    with pytest.raises(NonFiniteError) as caught:
        train(model, samples, tmp_path, observer)
    message = str(caught.value)
    assert message.startswith(f"step {step + 1}: loss nan and gradient norm") and "\n" not in message
    assert all(samples.ids[i] in message for i in order.indices(step))
    assert message.endswith(f"the state before it is in {tmp_path}/checkpoint-{step}")
    assert sorted(observer.states) == [*range(1, step + 1)]
    for name, value in adapter_state(model).items():  # nothing was updated
        assert torch.equal(value, observer.states[step][name])

    again = Keep(model)
    with pytest.raises(NonFiniteError) as caught:
        train(model, samples, tmp_path, again)
    assert again.began == step and str(caught.value) == message


def test_a_bad_gradient_stops_at_once(tmp_path: Path, paths: dict[str, str]) -> None:
    model = student(paths["llama"])
    next(iter(adapter_parameters(model).values())).register_hook(lambda g: g * math.inf)
    with pytest.raises(NonFiniteError, match=r"step 1: loss \d.*gradient norm (inf|nan).*no step was made before"):
        train(model, make_samples(paths["llama"]), tmp_path)


@pytest.mark.parametrize(("length", "k", "ok"), [(60, 4, True), (60, 5, False), (64, 0, True), (65, 0, False)])
def test_lengths(length: int, k: int, ok: bool) -> None:
    def check() -> None:
        training.check_lengths(["a", "b"], [Encoded([1, 2], [1, 2]), Encoded([1] * length, [1] * length)], [k, k], 64)

    if ok:
        check()
    else:
        with pytest.raises(InputError) as caught:
            check()
        message = str(caught.value)
        assert f"sample 'b': k={k} prompt tokens and {length} of its own" in message and "at most 64 " in message


def test_another_gpu_than_the_first() -> None:
    with pytest.raises(InputError, match=r"model.device='cuda:3'.*CUDA_VISIBLE_DEVICES"):
        training.make_arguments(Path("work"), torch.device("cuda:3"), 1, 0)


# Quiet


def test_only_progress_is_printed(tmp_path: Path, paths: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    model, samples = student(paths["llama"]), make_samples(paths["llama"])
    capfd.readouterr()
    train(model, samples, tmp_path / "work")
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("test  12/12  loss ") and err.count("\n") == 1
    assert [p.name for p in (tmp_path / "work").iterdir()] == []
