"""The product: opened by other tools as it is, told how it was made, and never read when it is damaged."""

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from nacd_fast import load_distilled
from nacd_fast.artifacts import read_json
from nacd_fast.distilled import COLUMNS, TOKEN_COLUMNS
from nacd_fast.errors import InputError
from nacd_fast.licences import licence
from nacd_fast.student import load_model, load_tokenizer
from tests.tiny import make_distilled, make_examples, make_model

DEMO = load_tokenizer("demo")
SOURCES = ("p3/one", "dolly/qa", "mine")
EXAMPLES = [replace(e, source=SOURCES[i % 3]) for i, e in enumerate(make_examples(7))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("opt"), "opt")


@pytest.fixture(scope="module")
def prompts(model: str) -> Tensor:
    """On tokens, a little beside them; the last one on a byte that is no character."""
    table = load_model(model, device="cpu")[0].get_input_embeddings().weight.detach()
    ids = torch.tensor(
        DEMO.convert_tokens_to_ids(["Ġthe", "a", "\n" if "\n" in DEMO.get_vocab() else "Ċ", "b"] * 3 + ["Ã", "a"])
    )
    return (table[ids] + 1e-3).view(7, 2, -1).contiguous()


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory, model: str, prompts: Tensor) -> Path:
    return make_distilled(tmp_path_factory.mktemp("run"), model, EXAMPLES, prompts)


@pytest.fixture
def copy(tmp_path: Path, model: str, prompts: Tensor) -> Path:
    """One that a test may damage."""
    return make_distilled(tmp_path, model, EXAMPLES, prompts)


def test_it_opens_with_datasets_and_safetensors(product: Path, prompts: Tensor, tmp_path: Path) -> None:
    table = datasets.load_dataset(str(product), split="train", cache_dir=str(tmp_path))
    assert tuple(table.column_names) == COLUMNS
    assert list(table["id"]) == [e.id for e in EXAMPLES]
    assert [tuple(m) for m in table["messages"]] == [e.messages for e in EXAMPLES]
    assert torch.equal(load_file(product / "prompts.safetensors")["prompts"], prompts)
    assert [DEMO.decode(ids) for ids in table["prompt_ids"]] == list(table["prompt_text"])
    assert list(table["prompt_text"])[:2] == [" thea", "\nb"] and all(table["survives"])
    last = table[6]
    assert any(last["rank"]) and min(last["margin"]) < 0 and len(last["next_tokens"]) == 2


def test_the_token_table_has_a_line_for_every_pseudo_token(product: Path) -> None:
    with (product / "tokens.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    samples = load_distilled(product).samples
    assert tuple(lines[0]) == TOKEN_COLUMNS and len(lines) == 14
    for n, line in enumerate(lines):
        row, place = samples[n // 2], n % 2
        assert (line["id"], int(line["place"])) == (row["id"], place)
        assert int(line["token_id"]) == row["prompt_ids"][place] and line["token"] == row["prompt_tokens"][place]
        assert float(line["distance"]) == row["distance"][place] and int(line["rank"]) == row["rank"][place]
        assert line["next_token"] == row["next_tokens"][place] == DEMO.decode([int(line["next_id"])])
        margin = float(line["next_distance"]) - float(line["distance"])
        assert float(line["margin"]) == row["margin"][place] == margin


def test_the_card_tells_sources_licences_and_how_it_was_made(product: Path, model: str) -> None:
    card = (product / "README.md").read_text()
    front, _, text = card.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(front)["configs"][0]["data_files"] == "dataset.parquet"
    assert "| p3/one | 3 | Apache-2.0 |\n| dolly/qa | 2 | CC BY-SA 3.0 |\n| mine | 2 | that of the source |" in text
    assert "1 of the prompts took further tokens" in text and "[7, 2, 32]" in text
    made = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert made == read_json(product / "config.json")["config"]
    assert made["model"]["path"] == model and made["matching"] == {"inner_steps": 6, "seed": 3}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("Dolly", "CC BY-SA 3.0"),
        ("dolly/open_qa", "CC BY-SA 3.0"),
        ("oasst1", "Apache-2.0"),
        ("flan_v2/rte", "Apache-2.0"),
        ("cot/gsm8k", "Apache-2.0"),
        ("arc", "CC BY-SA 4.0"),
        ("mmlu/anatomy", "MIT"),
        ("x/p3", "that of the source"),
        ("arctic-instruct", "that of the source"),  # not ARC
        ("cotton/prices", "that of the source"),  # not CoT
    ],
)
def test_licences(source: str, name: str) -> None:
    assert licence(source) == name


def test_five_lines_load_it(product: Path, prompts: Tensor) -> None:
    found = load_distilled(str(product))
    assert torch.equal(found.prompts, prompts) and found.texts == list(found.samples["prompt_text"])
    assert found.examples() == EXAMPLES and found.made["matching"]["seed"] == 3


@pytest.mark.parametrize("name", ["dataset.parquet", "prompts.safetensors", "tokens.csv"])
def test_a_changed_byte_is_seen(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(InputError, match=f"{name}: changed since its stage was finished"):
        load_distilled(copy)


def test_what_is_no_distilled_set(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished distilled set"):
        load_distilled(tmp_path / "nowhere")
    with pytest.raises(InputError, match="matching: not a distilled set"):
        load_distilled(copy.parent / "matching")


def test_prompts_and_samples_must_be_one_each(tmp_path: Path, model: str, prompts: Tensor) -> None:
    with pytest.raises(InputError, match="6 prompts for 7 kept samples"):
        make_distilled(tmp_path, model, EXAMPLES, prompts[:6].contiguous())


def test_plain_transformers_and_peft_train_on_it(product: Path, model: str, tmp_path: Path) -> None:
    """The example, in a process where this project cannot be imported."""
    example = Path(__file__).parents[1] / "examples" / "train_on_distilled.py"
    program = (
        "import runpy, sys; sys.modules['nacd_fast'] = sys.modules['nacd_kernels'] = None; "
        f"sys.argv = ['x', {str(product)!r}, {model!r}, {str(tmp_path / 'adapter')!r}, '--steps', '1']; "
        f"runpy.run_path({str(example)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    moved = [name for name, value in weights.items() if "lora_B" in name and value.any()]
    assert moved and "1 step on 7 samples" in done.stdout
