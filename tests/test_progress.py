"""What a long stage shows: in a log a line now and then, and always the last."""

import pytest

from nacd_fast import progress
from nacd_fast.progress import progress_bar


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, 4), (3600.0, 1)])
def test_a_log_gets_a_line_now_and_then_and_the_last(
    seconds: float, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", seconds)
    with progress_bar("matching", total=10, done=6) as bar:
        for _ in range(4):
            bar.advance(loss=0.5, alpha=0.125)
    captured = capsys.readouterr()
    shown = captured.err.splitlines()
    assert captured.out == ""
    assert len(shown) == lines
    assert shown[-1].startswith("matching  10/10  loss 0.5  alpha 0.125  ") and "s/it  peak " in shown[-1]
    assert shown[-1].endswith("MiB  ETA 0 s")


def test_pace_counts_only_the_steps_made_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A resumed stage that did 90 of 100 steps before must not look 10 times as fast."""
    clock = iter([0.0, 2.0, 4.0])
    monkeypatch.setattr("nacd_fast.progress.time.monotonic", lambda: next(clock))
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    with progress_bar("x", total=100, done=90) as bar:
        bar.advance()
        bar.advance()
    assert "2 s/it" in (last := capsys.readouterr().err.splitlines()[-1]) and last.endswith("ETA 16 s")
