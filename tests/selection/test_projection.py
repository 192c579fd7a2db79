"""The random projection: its bits, its statistics, its blocks."""

import numpy as np
import pytest
import torch

from nacd_fast.selection import projection
from nacd_fast.selection.projection import Projection

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


def splitmix(counter: int) -> int:
    """SplitMix64 as published, the state being golden * (counter + 1)."""
    mask = 2**64 - 1
    z = counter * 0x9E3779B97F4A7C15 & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


def test_words_are_splitmix64() -> None:
    found = projection.words(0, 4, 0, CPU).numpy().view(np.uint64).tolist()
    assert found == [splitmix(i + 1) for i in range(4)]
    assert found[0] == 0xE220A8397B1DCDAF  # the published first output of seed 0


def whole(d: int, P: int, seed: int) -> np.ndarray:
    """S [P, d], bit by bit."""
    state = seed * 0x9E3779B97F4A7C15  # times golden once more in splitmix
    words = [splitmix(state + 1 + w) for w in range(P * d // 64)]
    return np.array([1.0 if word >> bit & 1 else -1.0 for word in words for bit in range(64)]).reshape(P, d)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_any_block_is_that_of_the_whole_matrix(seed: int, device: torch.device) -> None:
    project, want = Projection(128, seed, device), whole(128, 50, seed)
    for first, rows in ((0, 50), (17, 1), (30, 20)):
        assert (project.signs(first, rows).cpu().numpy() == want[first : first + rows]).all()


@pytest.mark.parametrize("device", DEVICES)
def test_projection_is_the_product(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "BLOCK", 128 * 7)  # seven rows at a time, the last block a part of one
    g = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    found = Projection(128, 5, device, torch.float64)(g)
    torch.testing.assert_close(found.cpu(), g.cpu() @ torch.from_numpy(whole(128, 50, 5)) / 128**0.5)


def test_signs_are_balanced_and_uncorrelated() -> None:
    project = Projection(64, 3, CPU)
    s = project.signs(0, 8192).double()
    assert abs(float(s.mean())) < 5 / (64 * 8192) ** 0.5
    products = s.T @ s / 8192 - torch.eye(64)
    assert products.abs().max() < 5.5 / 8192**0.5
    assert abs(float((s[1:] * s[:-1]).mean())) < 5 / (64 * 8192) ** 0.5


def test_inner_products_survive() -> None:
    g = torch.nn.functional.normalize(torch.randn(20, 3000, generator=torch.Generator().manual_seed(1)), dim=1)
    y = Projection(4096, 0, CPU)(g)
    assert (y @ y.T - g @ g.T).abs().max() < 5 / 4096**0.5


def test_seeds_differ() -> None:
    first, second = (Projection(64, seed, CPU).signs(0, 100).clone() for seed in (0, 1))
    assert 0.4 < float((first == second).double().mean()) < 0.6
