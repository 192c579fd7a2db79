"""`nacd store`: what inspect, verify and convert print and make, and what bad input, kills and pipes get."""

import errno
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from itertools import count as count_from
from pathlib import Path

import pytest
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nacd_fast import cli, codec
from nacd_fast.store import TrajectoryStore, TrajectoryWriter, files
from nacd_fast.store.index import open_name
from nacd_fast.store.table import read_contents, render
from tests.store.snapshots import WIDE, assert_holds, assert_same_bits, killed_before, snapshot, write

Capture = pytest.CaptureFixture


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def path(here: Path) -> Path:
    """Snapshots 0, 10 .. 80 in a sealed group, 90 and 100 in an open one; as a path from the working folder."""
    path = Path("t.nacd")
    with pytest.raises(KeyboardInterrupt), TrajectoryWriter(path) as writer:
        for step in range(0, 110, 10):
            writer.append(step, snapshot(step))
        raise KeyboardInterrupt
    return path


@pytest.fixture
def folder(here: Path) -> Path:
    """Snapshots 2 and 10 as safetensors files of no fixed naming."""
    folder = Path("folder")
    folder.mkdir()
    for step in (2, 10):
        save_file(snapshot(step), folder / f"checkpoint-{step}.safetensors")
    return folder


def done(arguments: list[str], capsys: Capture) -> str:
    """What a command that must succeed prints."""
    capsys.readouterr()
    assert cli.main(["store", *arguments]) == 0
    return capsys.readouterr().out


def refused(arguments: list[str], here: Path, capsys: Capture) -> str:
    """The one sentence on stderr of a command that must fail with status 2 and leave every file as it was."""
    before = {p: p.read_bytes() if p.is_file() else b"" for p in here.rglob("*")}
    capsys.readouterr()
    assert cli.main(["store", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nacd: ")
    assert {p: p.read_bytes() if p.is_file() else b"" for p in here.rglob("*")} == before
    return line


def as_process(arguments: str, **options: str) -> "subprocess.CompletedProcess[str]":
    """`arguments` of a shell, in which $nacd is the command."""
    nacd = f"{sys.executable} -m nacd_fast.store"
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "nacd": nacd, "PYTHONPATH": paths, **options}
    return subprocess.run(["bash", "-c", arguments], capture_output=True, text=True, env=env, check=False)


# inspect


def test_inspect_as_json(path: Path, capsys: Capture) -> None:
    found = json.loads(done(["inspect", str(path), "--json"], capsys))
    summary, rows = found["summary"], found["snapshots"]
    size = path.stat().st_size + open_name(path).stat().st_size
    weights = sum(t.numel() for t in snapshot(0).values())
    assert found["file"] == str(path)
    assert summary == {
        "snapshots": 11,
        "weights": weights,
        "tensors": 4,
        "dtype": "float32",
        "layout": "hierarchical",
        "group_size": 8,
        "eps": 0.0,
        "bytes": size,
        "unfinished_bytes": 0,
        "ratio": 11 * 4 * weights / size,
        "backend": codec.backend(),
    }
    assert [row["step"] for row in rows] == list(range(0, 110, 10))
    assert [row["group"] for row in rows] == [1] * 9 + [2] * 2
    assert [row["sealed"] for row in rows] == [True] * 9 + [False] * 2
    assert [row["frames"] for row in rows] == [1, 5, 4, 5, 3, 5, 4, 5, 1, 2, 3]
    coded = {row["step"]: (row["coded"], row["references"]) for row in rows}
    assert coded[0] == ("key", []) and coded[40] == ("linear", [0, 80]) and coded[90] == ("previous", [80])
    assert all(row["bound"] == 0 and row["ratio"] == 4 * weights / row["bytes"] for row in rows)
    assert 0 < size - sum(row["bytes"] for row in rows) < 2000  # the schema and the seal


def test_inspect_shows_the_bounds(here: Path, capsys: Capture) -> None:
    write(Path("t.nacd"), range(3), {"a": (65,), "c": (3000,)}, eps=0.1)
    with TrajectoryStore(Path("t.nacd")) as store:
        bounds = [max(store.bounds(step).values()) for step in store.steps]
    found = json.loads(done(["inspect", "t.nacd", "--json"], capsys))
    assert [row["bound"] for row in found["snapshots"]] == bounds and bounds[0] == 0 < bounds[1]
    text = done(["inspect", "t.nacd"], capsys)
    assert text.count("exact") == 1 and f"{bounds[1]:.2g}" in text and "eps 0.1" in text


def test_inspect_in_a_pipe_is_plain_text(path: Path) -> None:
    found = as_process(f"$nacd inspect {path} | cat", PYTHONIOENCODING="ascii", COLUMNS="20")
    lines = found.stdout.splitlines()
    assert found.stderr == "" and found.stdout.isascii() and "\x1b" not in found.stdout
    assert lines[0].split() == ["step", "coded", "references", "frames", "bytes", "ratio", "bound", "group"]
    assert [line.split()[0] for line in lines[1:12]] == [str(step) for step in range(0, 110, 10)]
    assert lines[11].split("  ")[-1] == "2, open"
    assert lines[12].startswith(f"{path}: 11 snapshots of 81 weights in 4 tensors, float32, layout hierarchical")
    assert len(lines) == 13 and all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("width", [200, 80, 60, 40, 24])
def test_inspect_on_a_terminal_keeps_figures_whole(path: Path, width: int) -> None:
    contents = read_contents(path)
    console = Console(width=width, force_terminal=True, color_system=None, file=io.StringIO())
    lines = render(contents, console).splitlines()
    assert max(map(len, lines)) <= width and "…" not in "".join(lines)
    first = next(i for i, line in enumerate(lines) if "───" in line) + 1
    for line, row in zip(lines[first:], contents.snapshots):
        cells = line.split()
        assert cells[0] == str(row.step) and f"{row.bytes:,}" in cells and f"{row.ratio:.2f}" in cells
    assert ("█" in "".join(lines)) == (width == 200) and ("frames" in lines[first - 2]) == (width >= 40)


def test_what_reads_the_output_may_stop(path: Path) -> None:
    found = as_process(f"{{ $nacd inspect {path}; echo $? >&2; }} | true", PYTHONUNBUFFERED="")
    assert found.stderr == "141\n"


def test_an_empty_trajectory(here: Path, capsys: Capture) -> None:
    with TrajectoryWriter(Path("t.nacd")):
        pass
    assert "t.nacd: 0 snapshots of 0 weights" in done(["inspect", "t.nacd"], capsys)
    assert json.loads(done(["inspect", "t.nacd", "--json"], capsys))["snapshots"] == []
    assert done(["verify", "t.nacd"], capsys) == "t.nacd: 0 snapshots, every checksum right\n"
    write(Path("none.nacd"), [0], {})
    assert json.loads(done(["inspect", "none.nacd", "--json"], capsys))["snapshots"][0]["ratio"] == 0
    for name, least in (("t.nacd", 1), ("none.nacd", 4)):
        console = Console(width=200, force_terminal=True, file=io.StringIO())
        assert len(render(read_contents(Path(name)), console).splitlines()) >= least


# verify


def test_verify(path: Path, capsys: Capture) -> None:
    write(Path("u.nacd"), [3])
    assert done(["verify", "t.nacd", "u.nacd"], capsys).splitlines() == [
        "t.nacd: 11 snapshots, every checksum right",
        "u.nacd: 1 snapshot, every checksum right",
    ]


def test_verify_shows_its_pace(path: Path, capsys: Capture) -> None:
    assert cli.main(["store", "verify", str(path)]) == 0
    error = capsys.readouterr().err
    assert error.startswith("verify t.nacd  11/11  MB/s ") and error.endswith("ETA 0 s\n")


def test_verify_names_the_first_damage_and_goes_on(path: Path, here: Path, capsys: Capture) -> None:
    write(Path("u.nacd"), [3])
    with TrajectoryStore(path) as store:
        places = [store.index.frames[step].record for step in (30, 70)]
    data = bytearray(path.read_bytes())
    for place in places:
        data[place.payload + place.payload_bytes // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(AssertionError):  # reading does notice
        assert_holds(path, [])
    first = "t.nacd: the snapshot of step 30: a record's payload that changed since it was written"
    capsys.readouterr()
    assert cli.main(["store", "verify", "nowhere.nacd", "t.nacd", "u.nacd"]) == 2
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "nowhere.nacd: FAILED",
        "t.nacd: FAILED",
        "u.nacd: 1 snapshot, every checksum right",
    ]
    assert captured.err.splitlines()[-1] == "nacd: nowhere.nacd: no such file"
    assert refused(["verify", "t.nacd"], here, capsys) == f"nacd: {first}"


def test_a_file_that_was_cut(path: Path, capsys: Capture) -> None:
    open_name(path).unlink()
    with TrajectoryStore(path) as store:
        record = store.index.frames[0].record
    os.truncate(path, record.end + 100)
    rest = record.end - record.offset + 100
    told = f"{rest} bytes at the end of no snapshot: a write that was not finished, or a file that was cut"
    assert done(["verify", "t.nacd"], capsys) == f"t.nacd: 0 snapshots, every checksum right; {told}\n"
    assert done(["inspect", "t.nacd"], capsys).splitlines()[-1] == told
    assert json.loads(done(["inspect", "t.nacd", "--json"], capsys))["summary"]["unfinished_bytes"] == rest


# convert


def test_there_and_back(path: Path, capsys: Capture) -> None:
    write(Path("whole.nacd"), range(0, 110, 10))
    assert done(["convert", "t.nacd", "made/folder"], capsys) == "made/folder: 11 snapshots of 81 weights\n"
    names = [f"step{step:08d}.safetensors" for step in range(0, 110, 10)]
    assert sorted(p.name for p in Path("made/folder").iterdir()) == names
    assert_same_bits(dict(sorted(load_file("made/folder/step00000030.safetensors").items())), snapshot(30))
    with safe_open("made/folder/step00000030.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "30", "source": "t.nacd"}
    told = done(["convert", "made/folder", "back.nacd"], capsys)
    assert told == f"back.nacd: 11 snapshots, {Path('back.nacd').stat().st_size:,} bytes\n"
    assert Path("back.nacd").read_bytes() == Path("whole.nacd").read_bytes()
    assert {p.name for p in Path().iterdir()} == {"back.nacd", "made", "t.nacd", "t.nacd.open", "whole.nacd"}
    assert [p.name for p in Path("made").iterdir()] == ["folder"]


def test_one_snapshot(path: Path, capsys: Capture) -> None:
    done(["convert", "t.nacd", "made/one.safetensors", "--step", "70"], capsys)
    assert_same_bits(dict(sorted(load_file("made/one.safetensors").items())), snapshot(70))
    assert [p.name for p in Path("made").iterdir()] == ["one.safetensors"]


def test_a_folder_of_any_names(folder: Path, capsys: Capture) -> None:
    done(["convert", "folder", "made.nacd", "--layout", "fast", "--eps", "0.5"], capsys)
    with TrajectoryStore(Path("made.nacd")) as store:
        assert store.steps == [2, 10] and (store.schema.layout, store.schema.eps) == ("fast", 0.5)
        assert_same_bits(store.read(2), snapshot(2))
    done(["convert", "made.nacd", "one.safetensors", "--step", "10"], capsys)
    with safe_open("one.safetensors", "pt") as file:
        assert file.metadata()["eps"] == "0.5"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "store: the following arguments are required: COMMAND"),
        ("inspect", "store inspect: the following arguments are required: FILE"),
        ("inspect t.nacd --jso", "store: unrecognized arguments: --jso"),
        ("check t.nacd", "store: argument COMMAND: invalid choice: 'check'"),
        ("inspect nowhere.nacd", "nowhere.nacd: no such file"),
        ("inspect text", "text: damaged at byte 0: not a record"),
        ("inspect .", ".: a folder, must be a trajectory file"),
        ("verify text", "text: damaged at byte 0: not a record"),
        ("convert nowhere.nacd made", "nowhere.nacd: no such file"),
        ("convert text made", "text: damaged at byte 0: not a record"),
        ("convert t.nacd folder", "folder: is there already and is not overwritten"),
        ("convert t.nacd made.nacd", "made.nacd: must be a folder's name, a file is made by --step"),
        ("convert t.nacd made --step 10", "made: must end in .safetensors: --step makes one file"),
        ("convert t.nacd made.safetensors --step 11", "t.nacd: no snapshot at step 11; nearest: 10 and 20"),
        ("convert t.nacd made --eps 0.1", "--eps=0.1: for a folder as SOURCE, but t.nacd is not one"),
        ("convert t.nacd made --layout fast", "--layout=fast: for a folder as SOURCE, but t.nacd is not one"),
        ("convert folder t.nacd", "t.nacd: is there already and is not overwritten"),
        ("convert folder made", "made: must end in .nacd: a trajectory is made of a folder"),
        ("convert folder made.nacd --step 2", "--step=2: for a trajectory as SOURCE, but folder is a folder"),
        ("convert folder made.nacd --eps -1", "eps=-1.0, must be 0 (lossless) or a positive number"),
        ("convert folder made.nacd --eps x", "store convert: argument --eps: invalid float value: 'x'"),
        ("convert folder made.nacd --layout x", "store convert: argument --layout: invalid choice: 'x'"),
        ("convert . made.nacd", ".: holds no .safetensors files"),
    ],
)
def test_bad_arguments(path: Path, folder: Path, here: Path, capsys: Capture, arguments: str, message: str) -> None:
    Path("text").write_text("hello\n")
    assert refused(arguments.split(), here, capsys).startswith(f"nacd: {message}")


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("step-3b.safetensors", {}, "step-3b.safetensors: its name must end in its step, as step00000010.safetensors"),
        ("other-02.safetensors", {}, "other-02.safetensors: has the step 2 of checkpoint-2.safetensors"),
        ("step30.safetensors", {"b": (1,)}, "made.nacd (the snapshot of step 30: tensor a has shape None"),
        ("step30.safetensors", None, "folder/step30.safetensors: not a safetensors file ("),
    ],
)
def test_bad_files_in_a_folder(
    folder: Path, here: Path, capsys: Capture, name: str, tensors: dict[str, tuple[int, ...]] | None, message: str
) -> None:
    if tensors is None:
        (folder / name).write_text("hello")
    else:
        save_file(snapshot(0, tensors), folder / name)
    assert message in refused(["convert", "folder", "made.nacd"], here, capsys)


@pytest.mark.parametrize("arguments", ["convert t.nacd made", "convert folder made.nacd"])
def test_a_full_disk(
    path: Path, folder: Path, here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda folder: 10)
    assert "the disk has 10 bytes left" in refused(arguments.split(), here, capsys)


def test_an_error_of_the_disk(path: Path, here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert refused(["convert", "t.nacd", "made"], here, capsys) == "nacd: store: No space left on device"


def test_ctrl_c(path: Path, here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, needed: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nacd_fast.store.convert.check_room", interrupted)
    before = set(here.iterdir())
    assert cli.main(["store", "convert", "t.nacd", "made"]) == 130
    assert capsys.readouterr().err == "nacd: interrupted\n" and set(here.iterdir()) == before


@pytest.mark.parametrize(
    ("source", "target", "step"),
    [("t.nacd", "made", None), ("t.nacd", "made.safetensors", 10), ("folder", "made.nacd", None)],
)
def test_a_killed_convert_leaves_nothing_that_looks_finished(
    path: Path, folder: Path, here: Path, capsys: Capture, source: str, target: str, step: int | None
) -> None:
    made, part, kills = Path(target), Path(f"{target}.part"), {True: 0, False: 0}
    arguments = ["convert", source, target, *(["--step", str(step)] if step else [])]
    for call in ("mkdir", "fsync", "pwrite", "rename", "rmdir"):
        for number in count_from(0):
            if not killed_before(call, number, lambda: cli.main(["store", *arguments])):
                break
            kills[made.exists()] += 1
            if made.exists():
                assert_complete(made)
            elif part.exists():
                told = f"nacd: {part}: another convert is at work, or was killed: then remove it"
                assert refused(arguments, here, capsys) == told
            shutil.rmtree(part, ignore_errors=True)
            if made.exists():
                assert refused(arguments, here, capsys) == f"nacd: {made}: is there already and is not overwritten"
            else:
                done(arguments, capsys)
            remove(made)
        assert_complete(made)
        remove(made)
    assert kills[False] >= 3 and kills[True] >= 1


@pytest.mark.parametrize(
    ("arguments", "synced"),
    [("t.nacd made", ["step00000090.safetensors", "step00000100.safetensors", "made.part"]), ("folder made.nacd", [])],
)
def test_what_was_made_is_on_the_disk_before_it_has_its_name(
    path: Path, folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, arguments: str, synced: list[str]
) -> None:
    calls, fsync, rename = list[str](), os.fsync, os.rename

    def told_fsync(file: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)
        fsync(file)

    def told_rename(old: Path, new: Path) -> None:
        calls.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", told_fsync)
    monkeypatch.setattr(os, "rename", told_rename)
    done(["convert", *arguments.split()], capsys)
    assert calls[-2 - len(synced) :] == [*synced, "rename", Path.cwd().name]


def assert_complete(made: Path) -> None:
    if made.is_dir():
        assert [load_file(p).keys() for p in made.iterdir()] == [snapshot(0).keys()] * 11
    elif made.suffix == ".nacd":
        assert_holds(made, [2, 10])
    else:
        assert_same_bits(dict(sorted(load_file(made).items())), snapshot(10))


def remove(made: Path) -> None:
    if made.is_dir():
        shutil.rmtree(made)
    else:
        made.unlink()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # runpy: they are imported already
def test_it_runs_as_a_module(here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["store", "inspect", "nowhere.nacd"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("nacd_fast.store", run_name="__main__")
    assert stopped.value.code == 2 and capsys.readouterr().err == "nacd: nowhere.nacd: no such file\n"


def test_debug_shows_the_traceback(here: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        cli.main(["store", "inspect", "nowhere.nacd", "--debug"])


def test_large_tensors(here: Path, capsys: Capture) -> None:
    write(Path("t.nacd"), [1, 2], WIDE)
    done(["convert", "t.nacd", "made"], capsys)
    assert_same_bits(dict(sorted(load_file("made/step00000002.safetensors").items())), snapshot(2, WIDE))
