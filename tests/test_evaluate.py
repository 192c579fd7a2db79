"""Scores against Hugging Face's own loss, sample by sample; accuracy, ties, and what bad input gets."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nacd_fast import evaluate, losses
from nacd_fast.config import DataConfig, EvaluateConfig, ModelConfig
from nacd_fast.data import encode
from nacd_fast.errors import InputError, NonFiniteError
from nacd_fast.examples import Example, choice_examples
from nacd_fast.forms import read_set
from nacd_fast.intervals import read_items
from nacd_fast.student import add_lora, load_model, load_tokenizer

DATA = DataConfig()
SMALL: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=160)


def build(family: str, vocab: int) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "llama":  # grouped-query heads, tied embeddings
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True, **SMALL
            )
        )
    if family == "opt":  # with OPT-350M's projections between embedding and decoder
        return OPTForCausalLM(
            OPTConfig(
                vocab_size=vocab, ffn_dim=48, word_embed_proj_dim=16, dropout=0.1, do_layer_norm_before=False, **SMALL
            )
        )
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=vocab,
            intermediate_size=48,
            num_key_value_heads=2,
            head_dim=8,
            final_logit_softcapping=0.5,
            **SMALL,
        )
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one tiny random model a family, weights large enough to be sure of things."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = load_tokenizer("demo")
    for family in ("llama", "opt", "gemma2"):
        model = build(family, len(tokenizer))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)
        model.save_pretrained(root / family)
        tokenizer.save_pretrained(root / family)
    return root


@pytest.fixture(scope="module")
def test_set() -> list[Example]:
    short = [e for e in read_set("demo", "test") if sum(len(m["content"]) for m in e.messages) < 150]
    two_turns = replace(short[1], id="two-turns", messages=(*short[0].messages, *short[1].messages))
    return [*short[:9], two_turns, replace(short[10], choices=(), answer=None)]


def score(
    folder: Path, model: ModelConfig, test: list[Example], adapter: Path | None = None, batch: int = 4
) -> dict[str, Any]:
    return evaluate.run(folder, model, DATA, EvaluateConfig(batch=batch, bootstrap=200), test, adapter, "a row")


def plain_nll(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, example: Example
) -> tuple[float, int]:
    """Hugging Face's loss of one sample by itself: its sum and its tokens."""
    row = encode(example, tokenizer, DATA)
    with torch.no_grad():
        mean = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss
    tokens = sum(label != -100 for label in row.labels)
    return float(mean) * tokens, tokens


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_nll_is_hugging_faces(models: Path, test_set: list[Example], tmp_path: Path, family: str) -> None:
    config = ModelConfig(path=str(models / family))
    scores = score(tmp_path / "cell", config, test_set)
    model, tokenizer = load_model(config.path)
    expected = [plain_nll(model, tokenizer, e) for e in test_set]
    items = read_items(tmp_path / "cell" / "items.parquet")
    assert items.ids == tuple(e.id for e in test_set)
    assert items.tokens.tolist() == [tokens for _, tokens in expected]
    np.testing.assert_allclose(items.nll_sum, [nll for nll, _ in expected], rtol=1e-5)
    assert scores["nll"] == pytest.approx(sum(n for n, _ in expected) / sum(t for _, t in expected), rel=1e-6)
    assert scores["nll_interval"][0] < scores["nll"] < scores["nll_interval"][1]


def test_adapter_is_used(models: Path, test_set: list[Example], tmp_path: Path) -> None:
    config = ModelConfig(path=str(models / "llama"), rank=2)
    model, tokenizer = load_model(config.path)
    student = add_lora(model, config, seed=0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    student.save_pretrained(str(tmp_path / "adapter"))
    scores = score(tmp_path / "tuned", config, test_set, tmp_path / "adapter")
    expected = [plain_nll(student, tokenizer, e) for e in test_set]
    assert scores["nll"] == pytest.approx(sum(n for n, _ in expected) / sum(t for _, t in expected), rel=1e-6)
    assert scores != score(tmp_path / "base", config, test_set)
    with pytest.raises(InputError, match="adapter"):  # the folder holds another adapter's scores
        score(tmp_path / "base", config, test_set, tmp_path / "adapter")


def test_adapter_of_another_model(models: Path, test_set: list[Example], tmp_path: Path) -> None:
    model, _ = load_model(str(models / "llama"))
    add_lora(model, ModelConfig(targets=("o_proj", "q_proj")), seed=0).save_pretrained(str(tmp_path / "adapter"))
    opt = ModelConfig(path=str(models / "opt"))
    with pytest.raises(InputError, match="does not fit"):
        score(tmp_path / "cell", opt, test_set, tmp_path / "adapter")
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        score(tmp_path / "cell", opt, test_set, tmp_path / "nothing")
    assert not (tmp_path / "cell").exists()


def test_accuracy_is_by_average_log_likelihood(models: Path, test_set: list[Example], tmp_path: Path) -> None:
    config = ModelConfig(path=str(models / "llama"))
    model, tokenizer = load_model(config.path)
    averages = []
    for e in test_set[:9]:
        pairs = [plain_nll(model, tokenizer, option) for option in choice_examples(e)]
        averages.append([nll / tokens for nll, tokens in pairs])
    best = [int(np.argmin(a)) for a in averages]
    right = [replace(e, answer=i) for e, i in zip(test_set, best)]
    wrong = [replace(e, answer=(i + 1) % len(e.choices)) for e, i in zip(test_set, best)]
    mixed = [*right[:6], *wrong[6:], *test_set[10:]]
    scores = score(tmp_path / "cell", config, mixed)
    assert scores["accuracy"] == pytest.approx(6 / 9)
    assert read_items(tmp_path / "cell" / "items.parquet").correct[:9].tolist() == [1.0] * 6 + [0.0] * 3
    by_sum = [int(np.argmin([plain_nll(model, tokenizer, o)[0] for o in choice_examples(e)])) for e in test_set[:9]]
    assert by_sum != best, "the set must tell the average from the sum"


def test_candidates_are_scored_without_earlier_turns(models: Path, test_set: list[Example]) -> None:
    tokenizer = load_tokenizer("demo")
    row = encode(test_set[9], tokenizer, DATA)
    last = evaluate.last_response(row)
    alone = encode(replace(test_set[9], messages=test_set[9].messages[-2:]), tokenizer, DATA)
    assert [label for label in last.labels if label != -100] == [label for label in alone.labels if label != -100]
    assert sum(label != -100 for label in row.labels) > sum(label != -100 for label in last.labels)


def test_ties_take_the_lowest_index(models: Path, test_set: list[Example], tmp_path: Path) -> None:
    choices = ("the same", "the same")
    twins = [replace(test_set[0], id=f"twin-{answer}", choices=choices, answer=answer) for answer in (0, 1)]
    config = ModelConfig(path=str(models / "opt"))
    score(tmp_path / "cell", config, twins)
    assert read_items(tmp_path / "cell" / "items.parquet").correct.tolist() == [1.0, 0.0]


def test_no_choices_is_no_accuracy(models: Path, test_set: list[Example], tmp_path: Path) -> None:
    scores = score(tmp_path / "cell", ModelConfig(path=str(models / "opt")), test_set[10:])
    assert scores["accuracy"] is None and scores["accuracy_interval"] is None


def test_batches_do_not_matter_and_bytes_repeat(models: Path, test_set: list[Example], tmp_path: Path) -> None:
    config = ModelConfig(path=str(models / "llama"))
    for name, batch in (("a", 4), ("b", 4), ("c", 1)):
        score(tmp_path / name, config, test_set, batch=batch)
    for file in ("items.parquet", "scores.json", "manifest.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    a, c = (read_items(tmp_path / name / "items.parquet") for name in "ac")
    np.testing.assert_allclose(a.nll_sum, c.nll_sum, rtol=1e-5)
    np.testing.assert_array_equal(a.correct, c.correct)


def test_finished_cell_is_reused(
    models: Path, test_set: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(path=str(models / "opt"))
    first = score(tmp_path / "cell", config, test_set)
    monkeypatch.setattr(evaluate, "load_model", None)
    assert score(tmp_path / "cell", config, test_set) == first


def test_progress_label_is_no_setting(models: Path, test_set: list[Example], tmp_path: Path) -> None:
    config = ModelConfig(path=str(models / "opt"))
    first = score(tmp_path / "cell", config, test_set)
    settings = EvaluateConfig(batch=4, bootstrap=200)
    assert evaluate.run(tmp_path / "cell", config, DATA, settings, test_set, None, "another label") == first


def test_another_model_in_the_same_folder(models: Path, test_set: list[Example], tmp_path: Path) -> None:
    shutil.copytree(models / "opt", tmp_path / "model")
    config = ModelConfig(path=str(tmp_path / "model"))
    score(tmp_path / "cell", config, test_set)
    build("opt", 2048).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"made with other settings \(inputs.model="):
        score(tmp_path / "cell", config, test_set)


def test_chunks_of_logits(
    models: Path, test_set: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(path=str(models / "llama"))
    whole = score(tmp_path / "whole", config, test_set)
    monkeypatch.setattr(losses, "LOGIT_ELEMENTS", 3 * 2048)
    assert score(tmp_path / "chunks", config, test_set)["nll"] == pytest.approx(whole["nll"], rel=1e-6)


def test_not_finite_names_the_item(models: Path, test_set: list[Example], tmp_path: Path) -> None:
    model, tokenizer = load_model(str(models / "llama"))
    example = test_set[3]
    others = [o for e in test_set if e is not example for o in (e, *choice_examples(e))]
    elsewhere = {i for o in others for i in encode(o, tokenizer, DATA).input_ids}
    token = next(i for i in encode(example, tokenizer, DATA).input_ids if i not in elsewhere)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
        model.config.tie_word_embeddings = False
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(torch.nan_to_num(head.weight))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(NonFiniteError, match=example.id):
        score(tmp_path / "cell", ModelConfig(path=str(tmp_path / "model")), test_set)
    assert not (tmp_path / "cell" / "manifest.json").exists()


def test_bad_input(models: Path, test_set: list[Example], tmp_path: Path) -> None:
    config = ModelConfig(path=str(models / "llama"))
    question = {"role": "user", "content": "word and " * 200}
    long = replace(test_set[0], id="long one", messages=(question, test_set[0].messages[-1]))
    with pytest.raises(InputError, match=r"item 'long one': \d+ tokens, the model takes at most 160"):
        score(tmp_path / "cell", config, [*test_set, long])
    with pytest.raises(InputError, match="empty"):
        score(tmp_path / "cell", config, [])
    assert not (tmp_path / "cell").exists()
