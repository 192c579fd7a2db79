"""Tensors to flat words and back."""

import numpy as np
import pytest
import torch

from nacd_fast.store.schema import Schema, flatten, parse, schema_of, to_flat


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_words_and_back(dtype: torch.dtype) -> None:
    tensors = {
        "b": torch.randn(3, 5).to(dtype).T,
        "a": torch.randn(7).to(dtype),
        "none": torch.empty(0, 2, dtype=dtype),
    }
    schema = schema_of("x", tensors, "fast", 4, 0.0)
    assert list(schema.slices.items()) == [("a", slice(0, 7)), ("b", slice(7, 22)), ("none", slice(22, 22))]
    words = flatten(tensors, schema)
    wanted = torch.cat([tensors["a"], tensors["b"].reshape(-1)])
    assert np.array_equal(words.view(np.float32), wanted.float().numpy())
    assert torch.equal(to_flat(words, schema), wanted) and schema.count == 22
    assert parse("x", schema.to_json()) == schema


def test_other_devices_are_copied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device nothing can be copied tensor by tensor; one .cpu() call is made."""
    tensors = {"a": torch.empty(3, device="meta"), "b": torch.empty(2, 2, device="meta")}
    copies: list[int] = []

    def cpu(t: torch.Tensor) -> torch.Tensor:
        copies.append(t.numel())
        return torch.arange(7.0)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    words = flatten(tensors, Schema({"a": [3], "b": [2, 2]}, "float32", "fast", 4, 0.0))
    assert copies == [7] and words.view(np.float32).tolist() == list(range(7))
