"""Token losses against the models' own; prompts, soft caps, and pieces of the vocabulary product."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from nacd_fast import losses
from nacd_fast.config import DataConfig, ModelConfig
from nacd_fast.data import Encoded, collate, encode_set
from nacd_fast.losses import base_model, mean_nll, token_losses
from nacd_fast.student import adapter_parameters, add_lora, load_model, load_tokenizer
from tests.tiny import make_examples, make_model

PAD = 0
VOCABULARY = len(load_tokenizer("demo"))
ROWS = encode_set(make_examples(22), load_tokenizer("demo"), DataConfig(max_tokens=48))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedModel]:
    folders = {family: make_model(tmp_path_factory.mktemp(family), family) for family in ("llama", "opt")}
    return {family: load_model(folder, "float32", "cpu")[0].eval() for family, folder in folders.items()}


def own_loss(model: PreTrainedModel, rows: list[Encoded]) -> Tensor:
    """The loss that the model itself computes, with an attention mask."""
    batch = collate(rows, PAD)
    mask = torch.tensor([[i < len(row.input_ids) for i in range(batch["input_ids"].shape[1])] for row in rows])
    return model(**batch, attention_mask=mask.long()).loss


class Capped(nn.Module):
    """A soft cap behind the head, as in Gemma 2; notes how many logits it is given at once."""

    def __init__(self, base: PreTrainedModel):
        super().__init__()
        self.base, self.seen = base, list[int]()

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def forward(self, **inputs: Any) -> Any:
        out = self.base(**inputs)
        self.seen.append(out.logits.numel())
        out.logits = 2 * torch.tanh(out.logits / 2)
        return out


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_loss_is_the_models_own_and_padding_does_not_enter(models: dict[str, PreTrainedModel], family: str) -> None:
    model, rows = models[family], ROWS[:5]
    assert len({len(row.input_ids) for row in rows}) > 2
    together = token_losses(model, **collate(rows, PAD))
    other_pad = token_losses(model, **collate(rows, 7))
    alone = torch.cat([token_losses(model, **collate([row], PAD)) for row in rows])
    assert together.shape == (sum(label != -100 for row in rows for label in row.labels),)
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)
    assert torch.equal(together, other_pad)
    torch.testing.assert_close(together.mean(), own_loss(model, rows), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_prompts_in_front_are_like_tokens_in_front(models: dict[str, PreTrainedModel], family: str) -> None:
    model, rows = models[family], ROWS[:5]
    tokens = torch.randint(5, 500, (5, 3), generator=torch.Generator().manual_seed(0))
    longer = [
        Encoded([*p, *row.input_ids], [-100] * 3 + row.labels) for p, row in zip(tokens.tolist(), rows, strict=True)
    ]
    prompts = model.get_input_embeddings()(tokens).detach()
    in_front = token_losses(model, **collate(rows, PAD), prompts=prompts)
    assert torch.equal(in_front, token_losses(model, **collate(longer, PAD)))
    assert not torch.allclose(in_front, token_losses(model, **collate(rows, PAD)), atol=1e-3)


def test_what_a_family_does_to_its_logits_still_happens(models: dict[str, PreTrainedModel]) -> None:
    capped: Any = Capped(models["llama"])
    batch = collate(ROWS[:3], PAD)
    logits = 2 * torch.tanh(models["llama"](batch["input_ids"]).logits / 2)
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(token_losses(capped, **batch), expected[batch["labels"][:, 1:].flatten() != -100])
    assert not models["llama"].get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("most", [1, 3, 7, 1000])
def test_pieces_of_logits(models: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Rows longer and shorter than a piece, and prompts; with a gradient there are no pieces."""
    capped: Any = Capped(models["llama"])
    batch = {**collate(ROWS[:9], PAD), "prompts": torch.randn(9, 3, 32, generator=torch.Generator().manual_seed(0))}
    whole = token_losses(capped, **batch)
    monkeypatch.setattr(losses, "LOGIT_ELEMENTS", most * VOCABULARY + 5)
    assert torch.equal(token_losses(capped, **batch), whole) and capped.seen == [len(whole) * VOCABULARY] * 2
    capped.seen.clear()
    with torch.inference_mode():
        torch.testing.assert_close(token_losses(capped, **batch), whole, rtol=0, atol=2e-6)
    assert sum(capped.seen) == len(whole) * VOCABULARY and max(capped.seen) <= most * VOCABULARY
    assert len(capped.seen) == -(-len(whole) // most)


def test_mean_nll_weighs_tokens(tmp_path_factory: pytest.TempPathFactory) -> None:
    config = ModelConfig(path=make_model(tmp_path_factory.mktemp("opt"), "opt"), rank=4, device="cpu")
    base = load_model(config.path, "float32", "cpu")[0]
    plain = mean_nll(base, ROWS, 5, PAD)
    student = add_lora(base, config, 0).train()
    for name, parameter in adapter_parameters(student).items():
        torch.nn.init.normal_(parameter, std=0.1 * (".lora_B." in name) + 0.1)
    found = [token_losses(base_model(student), **collate([row], PAD)).detach().double() for row in ROWS]
    expected = torch.cat(found).mean().item()
    assert abs(expected - torch.stack([x.mean() for x in found]).mean()) > 1e-4 and abs(expected - plain) > 1e-4
    for batch in (1, 5, 64):
        assert mean_nll(student, ROWS, batch, PAD) == pytest.approx(expected, abs=1e-6)
