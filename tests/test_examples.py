"""The examples do what their docstrings claim, at --quick size, and leave their pictures."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, out: Path) -> dict[str, float]:
    """What the example's main returns; its picture is in `out`."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.main(["--quick", "--out", str(out)])
    (picture,) = out.iterdir()
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return found


def test_distilled_digits_beat_random_ones_at_flat_memory(tmp_path: Path) -> None:
    found = run("mtt_digits", tmp_path)
    assert found["random"] + 0.05 < found["distilled"] < found["full"]
    assert found["last loss"] < found["first loss"]
    assert found["flat N=20"] < 1.4 * found["flat N=10"] and found["retained N=20"] > 1.6 * found["retained N=10"]
    assert found["apart N=10"] < 1e-4 and found["apart N=20"] < 1e-4


def test_distilled_sentences_beat_random_ones(tmp_path: Path) -> None:
    found = run("text_classification", tmp_path)
    assert found["random"] + 0.02 < found["distilled"] < found["full"]


def test_learned_rates_beat_the_best_fixed_one(tmp_path: Path) -> None:
    found = run("maml_learning_rates", tmp_path)
    assert found["learned"] < found["fixed"] < found["random"]
    assert found["gain"] > 3 * found["spread"]
    assert found["first rate"] > found["last rate"]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_is_run(path: Path) -> None:
    """Here, or in test_distilled.py."""
    here, there = Path(__file__).read_text(), (Path(__file__).parent / "test_distilled.py").read_text()
    assert f'run("{path.stem}"' in here or f'"{path.name}"' in there
