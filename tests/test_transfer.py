"""A model tuned on a distilled set alone: the same as in the run that made it, and nothing of that run is read."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nacd_fast import cli, transfer, tune
from nacd_fast.artifacts import read_json
from nacd_fast.config import DataConfig, ModelConfig, TransferConfig, TuneConfig
from nacd_fast.data import encode_set
from nacd_fast.distilled import load_distilled
from nacd_fast.errors import InputError
from nacd_fast.forms import read_set
from nacd_fast.student import load_model
from tests.sets import write_lines
from tests.test_decode import opt_and_llama
from tests.tiny import make_distilled, make_examples, make_model, tree_digests

EXAMPLES, HELD_OUT = make_examples(8), make_examples(6, seed=1)
TUNE = TuneConfig(epochs=2, batch=4, lr=1e-2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The model that the set is distilled for, and another."""
    root = tmp_path_factory.mktemp("models")
    return make_model(root / "opt", "opt"), make_model(root / "llama", "llama")


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory, models: tuple[str, str]) -> Path:
    """A distilled set whose run is gone."""
    table = load_model(models[0], device="cpu")[0].get_input_embeddings().weight.detach()
    draw = torch.Generator().manual_seed(0)
    prompts = table[torch.randint(300, 2000, (8, 2), generator=draw)] + 0.01
    root = tmp_path_factory.mktemp("run")
    made = make_distilled(root, models[0], EXAMPLES, prompts)
    moved = tmp_path_factory.mktemp("elsewhere") / "set"
    shutil.copytree(made, moved)
    shutil.rmtree(root)
    return moved


@pytest.fixture
def validation(tmp_path: Path) -> Path:
    rows = [{"id": e.id, "source": e.source, "messages": list(e.messages)} for e in HELD_OUT]
    return write_lines(tmp_path / "validation.jsonl", *rows)


def config(product: Path, validation: Path, model: str, out: Path, **change: Any) -> TransferConfig:
    settings: dict[str, Any] = {"max_tokens": 48, "tune": TUNE, **change}
    return TransferConfig(
        distilled=str(product),
        validation=str(validation),
        out=str(out),
        model=ModelConfig(path=model, rank=4, device="cpu"),
        **settings,
    )


def run(settings: TransferConfig) -> Path:
    return transfer.run(settings, load_distilled(settings.distilled))


def tuned(folder: Path, model: str, prompts: Tensor | list[str] | None) -> Path:
    """What the run itself would have made of the kept samples."""
    return tune.run(
        folder, ModelConfig(path=model, rank=4, device="cpu"), DataConfig(max_tokens=48), TUNE, EXAMPLES, HELD_OUT, 0,
        epochs=2, prompts=prompts, label="test",
    )  # fmt: skip


@pytest.mark.parametrize("prompts", ["decoded", "none"])
def test_another_model_is_tuned_as_in_the_run(
    product: Path, validation: Path, models: tuple[str, str], tmp_path: Path, prompts: Any
) -> None:
    made = run(config(product, validation, models[1], tmp_path / "out", prompts=prompts))
    texts = load_distilled(product).texts if prompts == "decoded" else None
    want = tuned(tmp_path / "want", models[1], texts)
    assert tree_digests(made / "adapter") == tree_digests(want / "adapter")
    assert read_json(made / "log.json") == read_json(want / "log.json")


def test_the_models_own_embeddings(product: Path, validation: Path, models: tuple[str, str], tmp_path: Path) -> None:
    made = run(config(product, validation, models[0], tmp_path / "out", prompts="embeddings"))
    want = tuned(tmp_path / "want", models[0], load_distilled(product).prompts)
    assert tree_digests(made / "adapter") == tree_digests(want / "adapter")


def test_embeddings_of_another_model_are_refused(
    product: Path, validation: Path, models: tuple[str, str], tmp_path: Path
) -> None:
    with pytest.raises(
        InputError, match=rf"learned for the model {models[0]}, whose weights are not those of {models[1]}"
    ):
        run(config(product, validation, models[1], tmp_path / "out", prompts="embeddings"))
    assert not (tmp_path / "out").exists()


def test_the_command_on_the_sibling_with_another_tokenizer(
    product: Path, validation: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--distilled", str(product), "--validation", str(validation), "--out", str(tmp_path / "out")]
    flags += ["--model.path", "demo-sibling", "--model.device", "cpu", "--tune.epochs", "1", "--max_tokens", "64"]
    assert cli.main(["transfer", *flags, "--dry-run"]) == 0
    assert (
        "tune demo-sibling on 8 samples; its tokenizer spells 0 of their prompts otherwise" in capsys.readouterr().out
    )
    assert not (tmp_path / "out").exists()
    assert cli.main(["transfer", *flags]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"transfer: {tmp_path / 'out'}"
    assert len(read_json(tmp_path / "out" / "log.json")["epochs"]) == 1
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert cli.main(["transfer", *flags, "--tune.lr", "0.5"]) == 2
    assert "made with other settings" in capsys.readouterr().err


def test_bad_input(product: Path, validation: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for flags, message in (
        (["--distilled", str(tmp_path), "--validation", str(validation)], "no finished distilled set"),
        (["--distilled", str(product), "--validation", "nowhere"], "nowhere: no such file or folder"),
        (["--distilled", str(product)], "validation"),
        (
            ["--distilled", str(product), "--validation", "demo", "--max_tokens", "7"],
            "max_tokens=7: must be at least 8",
        ),
    ):
        assert cli.main(["transfer", *flags, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_no_token_of_llama_grows_across_the_border() -> None:
    """The prompts of an OPT in front of Llama-2's samples."""
    opt, llama = opt_and_llama()
    texts = [opt.decode([i, i + 1]) for i in range(1000, 41_000, 100)]
    rows = encode_set([replace(EXAMPLES[0], id=str(i)) for i in range(len(texts))], llama, DataConfig())
    longer = tune.put_in_front(texts, rows, llama)
    for text, new, row in zip(texts, longer, rows, strict=True):
        k = len(new.input_ids) - len(row.input_ids)
        assert k > 0 and new.input_ids[k:] == row.input_ids and row.input_ids[0] == llama.bos_token_id
        assert llama.decode(new.input_ids[:k]).removeprefix(" ") == text.removeprefix(" ")


def test_the_kept_samples_come_back_whole(product: Path) -> None:
    assert read_set(str(product / "dataset.parquet"), "train") == EXAMPLES
