"""Stage folders: finished, unfinished, made with other settings."""

import mmap
import os
from pathlib import Path

import pytest

from nacd_fast.artifacts import file_digest, folder_digest, open_stage, peak_bytes, read_json, reset_peak, write_atomic
from nacd_fast.errors import InputError


def work(folder: Path, config: dict, inputs: dict | None = None, text: str = "out") -> bool:
    """One stage that writes a file; True if it had anything to do."""
    with open_stage(folder, config, inputs) as stage:
        if stage.finished:
            return False
        (stage.work / "state").write_text("half")
        write_atomic(folder / "sub" / "out.txt", text.encode())
        return True


def test_a_finished_stage_is_reused_and_leaves_no_work(tmp_path: Path) -> None:
    assert work(tmp_path / "a", {"lr": 0.1, "names": ("x",)}, {"data": "d"})
    assert not work(tmp_path / "a", {"lr": 0.1, "names": ("x",)}, {"data": "d"})
    assert not (tmp_path / "a" / "work").exists()
    manifest = read_json(tmp_path / "a" / "manifest.json")["outputs"]
    assert manifest == {name: file_digest(tmp_path / "a" / name) for name in ("config.json", "sub/out.txt")}
    assert read_json(tmp_path / "a" / "timing.json")["peak_bytes"] > 0


def test_the_digest_is_of_the_outputs_and_of_the_settings(tmp_path: Path) -> None:
    for name, config, text in (
        ("a", {"lr": 1}, "x"),
        ("b", {"lr": 1}, "x"),
        ("c", {"lr": 2}, "x"),
        ("d", {"lr": 1}, "y"),
    ):
        work(tmp_path / name, config, text=text)
    digests = [folder_digest(tmp_path / name) for name in "abcd"]
    assert digests[0] == digests[1] and len(set(digests)) == 3


@pytest.mark.parametrize(
    ("config", "inputs", "message"),
    [
        ({"lr": 0.2, "deep": {"k": 1}}, {"data": "d"}, r"config.lr=0.2, was 0.1"),
        ({"lr": 0.1, "deep": {"k": 2}}, {"data": "d"}, r"config.deep.k=2, was 1"),
        ({"lr": 0.1, "deep": {"k": 1}}, {"data": "e"}, r"inputs.data='e', was 'd'"),
        ({"lr": 0.1, "deep": {"k": 1}, "new": 1}, {"data": "d"}, r"config.new=1, was None"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, config: dict, inputs: dict, message: str) -> None:
    work(tmp_path, {"lr": 0.1, "deep": {"k": 1}}, {"data": "d"})
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match=message):
        work(tmp_path, config, inputs)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_changed_or_lost_output_is_refused(tmp_path: Path) -> None:
    work(tmp_path, {})
    (tmp_path / "sub" / "out.txt").write_text("0ut")
    with pytest.raises(InputError, match=r"out.txt: changed since its stage was finished"):
        work(tmp_path, {})
    (tmp_path / "sub" / "out.txt").unlink()
    with pytest.raises(InputError, match=r"out.txt: gone since its stage was finished"):
        work(tmp_path, {})


def test_a_kill_after_the_manifest_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("nacd_fast.artifacts.shutil.rmtree", killed)
        work(tmp_path, {})
    assert (tmp_path / "work").exists()
    assert not work(tmp_path, {}) and not (tmp_path / "work").exists()


def test_an_exception_keeps_the_work_and_adds_up_the_time(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), open_stage(tmp_path, {}) as stage:
            assert stage.work.is_dir()
            (stage.work / "state").touch()
            raise ZeroDivisionError
        assert (tmp_path / "work" / "state").exists() and not (tmp_path / "manifest.json").exists()
    assert work(tmp_path, {})


def test_a_failed_write_leaves_the_old_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "f", b"old")

    def full(file: int) -> None:
        raise OSError("full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        write_atomic(tmp_path / "f", b"new and longer")
    assert (tmp_path / "f").read_bytes() == b"old"


def test_half_written_files_are_no_outputs(tmp_path: Path) -> None:
    with open_stage(tmp_path, {}) as stage:
        (tmp_path / "x.part").touch()
        assert [p.name for p in stage.outputs()] == ["config.json"]


def test_malformed_json_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match=r"x.json: not JSON"):
        read_json(tmp_path / "x.json")
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "y.json")


def test_peak_counts_from_the_reset() -> None:
    with mmap.mmap(-1, 2**26) as held:  # unlike the heap's memory, given back for certain when closed
        held[:: mmap.PAGESIZE] = bytes(2**26 // mmap.PAGESIZE)
    high = peak_bytes()
    reset_peak()
    assert peak_bytes() <= high - 2**25
