"""Chat JSONL for other trainers: the prompt in its place, the form that each of them reads."""

import json
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from nacd_fast import cli, export
from nacd_fast.distilled import load_distilled
from nacd_fast.errors import InputError
from nacd_fast.forms import read_set
from nacd_fast.student import load_model
from tests.tiny import make_distilled, make_examples, make_model

DEMO = Path(__file__).parents[1] / "nacd_fast" / "demo"
EXAMPLES = make_examples(4)


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_model(tmp_path_factory.mktemp("opt"), "opt")
    table = load_model(model, device="cpu")[0].get_input_embeddings().weight.detach()
    prompts = table[torch.arange(300, 308).view(4, 2)].contiguous()
    return make_distilled(tmp_path_factory.mktemp("run"), model, EXAMPLES, prompts)


@pytest.fixture(scope="module")
def exported(product: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.run(product, tmp_path_factory.mktemp("export") / "set")


def test_the_prompt_is_a_line_at_the_start_of_the_first_turn(product: Path, exported: Path) -> None:
    rows = [json.loads(line) for line in (exported / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    for row, example, prompt in zip(rows, EXAMPLES, load_distilled(product).texts, strict=True):
        first, *rest = row["messages"]
        assert (row["id"], row["source"]) == (example.id, example.source) and prompt
        assert first["role"] == "user" and first["content"] == f"{prompt}\n{example.messages[0]['content']}"
        assert tuple(rest) == example.messages[1:]


def test_a_system_turn_carries_it_and_an_empty_prompt_changes_nothing() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert export.with_prompt(turns, " so")[0] == {"role": "system", "content": " so\nBe brief."}
    assert export.with_prompt(turns, "") == turns and turns[0]["content"] == "Be brief."


def test_trl_form(exported: Path, tmp_path: Path) -> None:
    """What SFTTrainer asks of a conversational set: a column of role and content that a chat template takes."""
    rows = datasets.load_dataset(
        "json", data_files=str(exported / "train.jsonl"), split="train", cache_dir=str(tmp_path)
    )
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    for row in rows:
        assert [set(turn) for turn in row["messages"]] == [{"role", "content"}] * 2
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert text.startswith("<user>") and "<assistant>" in text


def test_the_card_opens_the_folder_as_a_set(exported: Path, product: Path, tmp_path: Path) -> None:
    rows = datasets.load_dataset(str(exported), split="train", cache_dir=str(tmp_path))
    assert rows.column_names == ["id", "source", "messages"] and len(rows) == 4
    assert "How it was made" in (exported / "README.md").read_text()
    assert (exported / "prompts.safetensors").read_bytes() == (product / "prompts.safetensors").read_bytes()


def test_llama_factory_and_axolotl_find_the_file(exported: Path) -> None:
    """The keys are those of LLaMA-Factory's data/README.md and of Axolotl's dataset options."""
    (entry,) = json.loads((exported / "dataset_info.json").read_text()).values()
    assert (exported / entry["file_name"]).is_file() and entry["formatting"] == "sharegpt"
    tags, rows = entry["tags"], [json.loads(line) for line in (exported / entry["file_name"]).read_text().splitlines()]
    for row in rows:
        turns = [(turn[tags["role_tag"]], turn[tags["content_tag"]]) for turn in row[entry["columns"]["messages"]]]
        assert [role for role, _ in turns] == [tags["user_tag"], tags["assistant_tag"]]
    (source,) = yaml.safe_load((exported / "axolotl.yaml").read_text())["datasets"]
    assert (exported / source["path"]).is_file() and source["type"] == "chat_template" and source["ds_type"] == "json"
    assert all(source["field_messages"] in row for row in rows)


def test_what_is_written_can_be_read_back(exported: Path) -> None:
    assert len(read_set(str(exported / "train.jsonl"), "train")) == 4


def test_the_command(product: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["export", str(product), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"export: {tmp_path / 'out'}\n"
    assert cli.main(["export", str(product), str(tmp_path / "out")]) == 2
    assert "out: must be a new or empty folder" in capsys.readouterr().err
    assert cli.main(["export", str(product)]) == 2
    assert "required: OUT" in capsys.readouterr().err
    with pytest.raises(InputError, match="no finished distilled set"):
        export.run(tmp_path, tmp_path / "other")
