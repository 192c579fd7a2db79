"""Figures: the same bytes for the same numbers, labels to the letter, every point within its bin."""

import numpy as np
import pytest

from nacd_fast import plots

CURVE = {"seed 0": ([*range(1000)], [0.02 + 0.00003 * i for i in range(1000)])}


def test_same_numbers_same_bytes() -> None:
    assert plots.draw_curves("reg", "L_reg", CURVE) == plots.draw_curves("reg", "L_reg", CURVE)
    svg = plots.draw_scores([("FULL", [1.0, 2.0], False)], "NLL")
    assert svg == plots.draw_scores([("FULL", [1.0, 2.0], False)], "NLL")
    assert "date" not in svg.lower() and svg.startswith("<svg") and svg.endswith("</svg>")


def test_coordinates_are_cut_but_labels_are_not() -> None:
    svg = plots.draw_curves("reg", "1.23456", CURVE)
    assert ">0.025</text>" in svg and ">1.23456</text>" in svg
    assert "style>" not in svg and "metadata" not in svg


def test_iterations_are_whole() -> None:
    svg = plots.draw_curves("reg", "L_reg", {"seed 0": ([*range(20)], [1.0] * 20)})
    assert ">20</text>" in svg or ">16</text>" in svg
    assert ">2.5</text>" not in svg


def test_every_colour_is_replaced() -> None:
    svg = plots.draw_curves("a", "a", {f"seed {i}": ([0, 1], [i, i + 1]) for i in range(6)})
    assert all(stand_in in svg for stand_in in plots.COLOURS)
    page, file = plots.inline(svg, 'a "b" <c>'), plots.standalone(svg)
    assert not any(stand_in in page or stand_in in file for stand_in in plots.COLOURS)
    assert 'aria-label="a &quot;b&quot; &lt;c>"' in page and f'fill="{plots.PAPER}"' in file and "var(" not in file


@pytest.mark.parametrize("n", [1, 2, 299, 300, 301, 1000])
def test_bins_hold_every_point(n: int) -> None:
    x, y = plots.binned(np.arange(n, dtype=float), np.arange(n, dtype=float) ** 2)
    assert len(x) == len(y) == min(n, plots.BINS)
    counts = np.diff([*np.linspace(0, n, len(x) + 1).astype(int)])
    assert (x * counts).sum() == pytest.approx(n * (n - 1) / 2)
    assert (y * counts).sum() == pytest.approx(sum(i * i for i in range(n)))


def test_running_mean_keeps_lines_and_ends() -> None:
    line = np.arange(200.0)
    smooth = plots.running_mean(line)
    np.testing.assert_allclose(smooth[5:-5], line[5:-5])
    assert smooth[0] == pytest.approx(line[:6].mean())
    np.testing.assert_allclose(plots.running_mean(np.array([3.0, 1.0])), [3.0, 1.0])
