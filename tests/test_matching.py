"""Algorithm 1 against a plain create_graph version of it; its guards; its resume."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nacd_fast import experts, matching
from nacd_fast.artifacts import file_digest
from nacd_fast.config import DataConfig, ExpertConfig, MatchConfig, ModelConfig
from nacd_fast.errors import InputError, NonFiniteError
from nacd_fast.progress import Bar
from nacd_fast.store import TrajectoryStore
from tests.tiny import make_examples, make_model

DATA = DataConfig()
EXPERTS = ExpertConfig(epochs=2, batch=4, optimizer="sgd", lr=0.1, snapshot_steps=2, count=1)
MATCH = MatchConfig(
    iterations=6, inner_steps=3, span_steps=2, max_start_epoch=1, batch=2, beta=0.3, alpha=0.1, save_every=2
)
FULL = make_examples(16)
KEPT = FULL[:5]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig(path=make_model(tmp_path_factory.mktemp("model")), rank=2, lora_alpha=4.0, device="cpu")


@pytest.fixture(scope="module")
def expert(model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return experts.run(tmp_path_factory.mktemp("expert") / "expert0", model, DATA, EXPERTS, FULL, 0)


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: file_digest(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name != "timing.json"}


def test_one_iteration_is_algorithm_1(model: ModelConfig, expert: Path) -> None:
    """Equations 1 to 4 written out with a retained graph, and torch.optim.Adam for the updates."""
    matcher, _ = matching.prepare(model, DATA, MATCH, KEPT, [expert])
    student = matcher.student
    learned = matching.Learned.start(
        matching.first_prompts(MATCH, len(KEPT), student.embedding, torch.zeros(0), 0), MATCH.alpha, seed=4
    )
    prompts = learned.prompts.clone().requires_grad_()
    log_alpha = learned.log_alpha.clone().requires_grad_()
    generator = torch.Generator().manual_seed(4)
    chosen = matcher.segments[int(torch.randint(len(matcher.segments), (1,), generator=generator))]
    drawn = matching.draw_batches(len(KEPT), MATCH.inner_steps, MATCH.batch, generator)

    store = TrajectoryStore(expert / experts.TRAJECTORY)
    start, target = (
        student.flatten(store.read(chosen.start)),
        student.flatten(store.read(chosen.start + MATCH.span_steps)),
    )
    theta, distance = start.clone().requires_grad_(), torch.zeros(())
    for rows in drawn:
        loss = student.loss(student.unflatten(theta), prompts[rows], matcher.batch(rows))
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        theta = theta - log_alpha.exp() * gradient
        table = student.embedding[~matcher.banned]
        distance = distance + torch.cdist(prompts[rows].flatten(0, 1), table).min(-1).values.mean() / MATCH.inner_steps
    distill = (theta - target).square().sum() / (start - target).square().sum()
    (distill + MATCH.beta * distance).backward()
    torch.optim.Adam([prompts], lr=MATCH.prompt_lr).step()
    torch.optim.Adam([log_alpha], lr=MATCH.alpha_lr).step()

    with matcher.ahead(learned) as ahead:
        numbers = matcher.iterate(learned, next(ahead))
    assert numbers["distill"] == pytest.approx(float(distill), rel=1e-5)
    assert numbers["reg"] == pytest.approx(float(distance), rel=1e-4)
    assert numbers["loss"] == pytest.approx(float(distill) + MATCH.beta * float(distance), rel=1e-4)
    # Adam's first step has the size of its rate whatever the gradient is; its first moment has the gradient in it
    for moment, leaf in ((learned.moments[0], prompts), (learned.moments[2], log_alpha)):
        assert leaf.grad is not None
        torch.testing.assert_close(moment, (1 - matching.BETAS[0]) * leaf.grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(learned.log_alpha, log_alpha.detach(), rtol=1e-5, atol=1e-6)
    moved = drawn.unique()
    torch.testing.assert_close(learned.prompts[moved], prompts.detach()[moved], rtol=1e-3, atol=1e-4)


def test_only_drawn_prompts_move_and_each_counts_its_own_updates() -> None:
    g = torch.Generator().manual_seed(0)
    x, grads = torch.randn(3, 2, generator=g), torch.randn(4, 2, generator=g)
    ours, moments, counts = x.clone(), (torch.zeros(3, 2), torch.zeros(3, 2)), torch.zeros(3, dtype=torch.int64)
    for step, row in enumerate([0, 2, 2, 0]):
        rows = torch.tensor([row])
        counts[rows] += 1
        matching.adam_step(ours, grads[step : step + 1], moments, rows, counts[rows], 0.1)
    for row, steps in ((0, [0, 3]), (2, [1, 2])):
        alone = x[row].clone().requires_grad_()
        optimizer = torch.optim.Adam([alone], lr=0.1)
        for step in steps:
            alone.grad = grads[step].clone()
            optimizer.step()
        torch.testing.assert_close(ours[row], alone.detach())
    assert torch.equal(ours[1], x[1])


def test_batches_repeat_no_sample_before_all_were_drawn() -> None:
    drawn = matching.draw_batches(7, 6, 4, torch.Generator().manual_seed(0))
    assert drawn.shape == (6, 4)
    counts = drawn.flatten().bincount(minlength=7)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("update", ["sgd", "momentum", "adamw"])
def test_matching_lowers_the_distance(model: ModelConfig, expert: Path, tmp_path: Path, update: Any) -> None:
    config = replace(
        MATCH, iterations=40, beta=0.0, update=update, alpha=0.01 if update == "adamw" else 0.1, prompt_lr=0.02
    )
    folder = matching.run(tmp_path / "match", model, DATA, config, KEPT, [expert], 0)
    means = json.loads((folder / "summary.json").read_text())["means"]["distill"]
    assert means["last"] < means["first"]
    prompts = load_file(folder / "prompts.safetensors")["prompts"]
    assert prompts.shape == (5, 2, 32) and prompts.isfinite().all() and prompts.std(0).min() > 0
    assert len(json.loads((folder / "curve.json").read_text())) == 40


@pytest.mark.parametrize("change", [dict(checkpointing=True), dict(retain_steps=2), dict(retain_steps=9)])
def test_what_saves_memory_or_time_gives_the_same_curve(
    change: dict, model: ModelConfig, expert: Path, tmp_path: Path
) -> None:
    curves = []
    for name, config in (("plain", MATCH), ("changed", replace(MATCH, **change))):
        folder = matching.run(tmp_path / name, model, DATA, config, KEPT, [expert], 0)
        curves.append([row["loss"] for row in json.loads((folder / "curve.json").read_text())])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_resumes_to_the_same_bytes(
    model: ModelConfig, expert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    whole = hashes(matching.run(tmp_path / "whole", model, DATA, MATCH, KEPT, [expert], 0))
    advance = Bar.advance

    def stops(bar: Bar, *args: Any, **numbers: Any) -> None:
        advance(bar, *args, **numbers)
        if bar.done == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Bar, "advance", stops)
        matching.run(tmp_path / "cut", model, DATA, MATCH, KEPT, [expert], 0)
    assert not (tmp_path / "cut" / "manifest.json").exists()
    assert hashes(matching.run(tmp_path / "cut", model, DATA, MATCH, KEPT, [expert], 0)) == whole


def test_experts_share_one_cache_and_are_closed(
    model: ModelConfig, expert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[TrajectoryStore] = []

    class Watched(TrajectoryStore):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(matching, "TrajectoryStore", Watched)
    matching.run(tmp_path / "match", model, DATA, MATCH, KEPT, [expert, expert], 0)
    assert len(made) == 2 and made[0].caches is made[1].caches
    assert all(file.closed for store in made for file in store.files)


def test_alpha_is_held_at_its_limit(model: ModelConfig, expert: Path, tmp_path: Path) -> None:
    config = replace(MATCH, alpha=0.05, alpha_max=0.051, alpha_lr=0.5, iterations=4)
    folder = matching.run(tmp_path / "match", model, DATA, config, KEPT, [expert], 0)
    alphas = [row["alpha"] for row in json.loads((folder / "curve.json").read_text())]
    assert max(alphas) <= 0.051 * (1 + 1e-6) and min(alphas) < max(alphas)


def test_non_finite_loss_names_iteration_step_and_samples_and_keeps_the_last_state(
    model: ModelConfig, expert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = hashes(matching.run(tmp_path / "whole", model, DATA, MATCH, KEPT, [expert], 0))
    iterate = matching.Matcher.iterate

    with monkeypatch.context() as patch:

        def poisoned(matcher: matching.Matcher, learned: matching.Learned, ready: matching.Ready) -> dict[str, float]:
            if len(learned.curve) == 3:
                patch.setattr(matcher.student, "loss", lambda p, *_, **__: torch.nan * sum(t.sum() for t in p.values()))
            return iterate(matcher, learned, ready)

        patch.setattr(matching.Matcher, "iterate", poisoned)
        with pytest.raises(NonFiniteError) as caught:
            matching.run(tmp_path / "match", model, DATA, MATCH, KEPT, [expert], 0)
    message = r"iteration 3: inner step 0 of 3: the loss is nan \(samples x0-\d.*last good state is kept in .*state"
    assert re.search(message, str(caught.value))
    state = matching.Learned.load(tmp_path / "match" / "work" / "state.safetensors", torch.device("cpu"))
    assert len(state.curve) == 3 and state.prompts.isfinite().all()
    assert not (tmp_path / "match" / "manifest.json").exists()
    assert hashes(matching.run(tmp_path / "match", model, DATA, MATCH, KEPT, [expert], 0)) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(span_steps=3), "match.span_steps=3: no two"),
        (dict(max_start_epoch=3), "beyond the experts' last snapshot at 8"),
        (dict(span_steps=100), "beyond the experts' last snapshot at 8"),
    ],
)
def test_starts_beyond_the_snapshots_are_named(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        matching.check_starts(replace(MATCH, **change), EXPERTS, len(FULL))


@pytest.mark.parametrize(
    ("examples", "change", "message"),
    [
        (KEPT[:1], {}, "fewer than match.batch=2"),
        (KEPT, dict(prompt_tokens=60), "takes at most 64 in all"),
        (KEPT, dict(span_steps=1), "match.span_steps=1"),
    ],
)
def test_bad_input_writes_nothing(
    model: ModelConfig, expert: Path, tmp_path: Path, examples: list, change: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        matching.run(tmp_path / "match", model, DATA, replace(MATCH, **change), examples, [expert], 0)
    assert not (tmp_path / "match").exists()


def test_adapters_of_another_rank_are_refused(model: ModelConfig, expert: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="another rank"):
        matching.run(tmp_path / "match", replace(model, rank=3), DATA, MATCH, KEPT, [expert], 0)


def test_prompts_can_start_at_random_tokens(model: ModelConfig) -> None:
    table = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    made = matching.first_prompts(replace(MATCH, prompt_init="tokens"), 50, table, torch.tensor([2, 5]), seed=0)
    rows = {i for p in made.flatten(0, 1) for i in range(9) if torch.equal(p, table[i])}
    assert rows == {2, 5}
    assert torch.equal(matching.first_prompts(MATCH, 3, table, torch.zeros(0), 0)[1, 1], table.mean(0))


def test_a_changed_trajectory_is_refused(model: ModelConfig, expert: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(expert, tmp_path / "expert")
    path = copy / experts.TRAJECTORY
    data = bytearray(path.read_bytes())
    place = TrajectoryStore(path).index.frames[0].record
    data[place.payload + place.frame_bytes - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="the snapshot of step 0: a checksum that does not fit its bytes"):
        matching.run(tmp_path / "match", model, DATA, MATCH, KEPT, [copy], 0)
