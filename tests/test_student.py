"""Loading, LoRA, and the patched model against the one it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from nacd_fast.config import ModelConfig
from nacd_fast.errors import InputError
from nacd_fast.student import Student, adapter_state, add_lora, load_adapter_state, load_model, resolve_device
from tests.tiny import make_model


def lora_model(path: str, seed: int = 0, **settings: Any) -> Any:
    model, _ = load_model(path, device="cpu")
    return add_lora(model, ModelConfig(path=path, **{"rank": 3, **settings}), seed)


@pytest.mark.parametrize("path", ["demo", "demo-sibling"])
def test_the_embedded_models_load_and_speak(path: str) -> None:
    model, tokenizer = load_model(path, device="cpu")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert float(model(ids, labels=ids).loss) < 6
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_patched_loss_equals_transformers(family: str, checkpointing: bool, tmp_path: Path) -> None:
    path = make_model(tmp_path, family)
    plain, patched = lora_model(path), lora_model(path)
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.1 * torch.randn(t.shape, generator=generator) for name, t in adapter_state(plain).items()}
    load_adapter_state(plain, state)
    student = Student(patched, checkpointing=checkpointing)
    ids = torch.randint(4, 500, (3, 9), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    prompts = 0.1 * torch.randn(3, 2, 32, generator=generator)
    x = torch.cat([prompts, plain.get_input_embeddings()(ids)], 1)
    want = plain(inputs_embeds=x, labels=nn.functional.pad(labels, (2, 0), value=-100)).loss
    got = student.loss(student.unflatten(student.flatten(state)), prompts, ids, labels)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    alone = student.loss(state, None, ids, labels)
    torch.testing.assert_close(alone, plain(ids, labels=labels).loss, rtol=1e-5, atol=1e-5)


def test_checkpointing_recomputes_with_the_adapters_of_its_own_forward(tmp_path: Path) -> None:
    """Two losses at two thetas before one backward pass, as in a retained unroll."""
    path = make_model(tmp_path)
    ids = torch.randint(4, 500, (2, 7), generator=torch.Generator().manual_seed(0))
    grads = []
    for checkpointing in (False, True):
        student = Student(lora_model(path), checkpointing=checkpointing)
        size = sum(shape.numel() for shape in student.shapes.values())
        thetas = [
            (0.1 * torch.randn(size, generator=torch.Generator().manual_seed(i))).requires_grad_() for i in (1, 2)
        ]
        losses = [student.loss(student.unflatten(theta), None, ids, ids) for theta in thetas]
        grads.append(torch.autograd.grad(losses, thetas))
    for kept, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, kept)


def test_flatten_and_unflatten_are_inverse() -> None:
    student = Student(lora_model("demo"))
    state = {name: torch.randn(shape) for name, shape in student.shapes.items()}
    back = student.unflatten(student.flatten(state))
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


def test_adapters_are_float32_zero_in_b_and_drawn_from_the_seed() -> None:
    states = [adapter_state(lora_model("demo", seed)) for seed in (0, 0, 1)]
    for name, t in states[0].items():
        assert t.dtype == torch.float32
        assert torch.equal(t, states[1][name])
        assert (not t.any()) if ".lora_B." in name else not torch.equal(t, states[2][name])


def test_drawing_adapters_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    lora_model("demo", 3)
    here = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(here, torch.rand(1))


def test_dropout_is_off(tmp_path: Path) -> None:
    model, _ = load_model(make_model(tmp_path, "opt"), device="cpu")  # its config says 0.1
    ids = torch.arange(4, 12)[None]
    model.train()
    assert torch.equal(model(ids).logits, model(ids).logits)


def missing(tmp_path: Path) -> object:
    return load_model(str(tmp_path / "nowhere"))


def no_config(tmp_path: Path) -> object:
    path = Path(make_model(tmp_path))
    (path / "config.json").unlink()
    return load_model(str(path))


def too_many_tokens(tmp_path: Path) -> object:
    from nacd_fast.student import load_tokenizer

    path = make_model(tmp_path)
    tokenizer = load_tokenizer("demo")
    tokenizer.add_tokens(["<one>"])
    tokenizer.save_pretrained(path)
    return load_model(path)


def other_family(tmp_path: Path) -> object:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10)).requires_grad_(False)
    return Student(add_lora(model, ModelConfig(rank=1, targets=("c_attn", "lm_head")), 0))


def without_weight(tmp_path: Path) -> object:
    path = Path(make_model(tmp_path)) / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, path, {"format": "pt"})
    return load_model(str(tmp_path))


def other_shape(tmp_path: Path) -> object:
    path = Path(make_model(tmp_path, "opt")) / "model.safetensors"
    save_file({**load_file(path), "model.decoder.layers.0.fc1.bias": torch.zeros(3)}, path, {"format": "pt"})
    return load_model(str(tmp_path))


def broken(name: str, content: bytes) -> Callable[[Path], object]:
    """Loads a model folder in which one file has been overwritten."""

    def load(tmp_path: Path) -> object:
        path = Path(make_model(tmp_path)) / name
        if name.endswith(".bin"):
            path.with_name("model.safetensors").unlink()
        path.write_bytes(content)
        return load_model(str(tmp_path))

    return load


def ill_typed_config(tmp_path: Path) -> object:
    path = Path(make_model(tmp_path)) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": "wide"}))
    return load_model(str(tmp_path))


def unknown_tokenizer(tmp_path: Path) -> object:
    path = Path(make_model(tmp_path)) / "tokenizer.json"
    path.write_text(path.read_text().replace('"BPE"', '"other"'))
    return load_model(str(tmp_path))


def biased_head(tmp_path: Path) -> object:
    model, _ = load_model(make_model(tmp_path), device="cpu")
    model.lm_head.bias = nn.Parameter(torch.zeros(model.config.vocab_size), requires_grad=False)
    return Student(add_lora(model, ModelConfig(rank=1), 0))


def test_a_tied_head_is_not_a_missing_weight(tmp_path: Path) -> None:
    make_model(tmp_path, "opt")
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model, _ = load_model(str(tmp_path), device="cpu")
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(("gpus", "auto"), [(0, "cpu"), (2, "cuda")])
def test_devices(gpus: int, auto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert resolve_device("auto") == torch.device(auto) and resolve_device("cpu") == torch.device("cpu")
    if gpus:
        assert resolve_device("cuda:1") == torch.device("cuda", 1)
    there = "auto, cpu, cuda, cuda:0, cuda:1" if gpus else "auto, cpu"
    for device in ("gpu", "cuda:2", *([] if gpus else ["cuda", "cuda:0"])):
        with pytest.raises(InputError, match=f"^model.device='{device}': must be one of {there} on this machine$"):
            resolve_device(device)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (missing, "nowhere"),
        (no_config, "no config.json"),
        (without_weight, "the model's files lack the weight model.layers.0.mlp.up_proj.weight"),
        (other_shape, r"weight model.decoder.layers.0.fc1.bias has the shape \[3\], its config.json says \[48\]"),
        (broken("model.safetensors", b"junk"), "the model does not load .*header too small"),
        (broken("model.safetensors", b"\xff" * 99), "the model does not load"),
        (broken("pytorch_model.bin", b""), "the model does not load"),
        (broken("pytorch_model.bin", b"junk"), "the model does not load"),
        (broken("pytorch_model.bin", b"PK\x03\x04junk"), "the model does not load"),
        (broken("config.json", b"{"), "does not load"),
        (ill_typed_config, "does not load .*hidden_size"),
        (broken("tokenizer.json", b"[]"), "its tokenizer does not load"),
        (unknown_tokenizer, r"its tokenizer does not load \(data did not match any variant"),
        (lambda _: Student(lora_model("demo", targets=("q_proj", "lm_head"))), "lm_head is outside the decoder"),
        (biased_head, "its output head has a bias"),
        (too_many_tokens, "the tokenizer has 2049 tokens, the model only 2048"),
        (other_family, "model type 'gpt2': matching knows llama, opt"),
        (lambda _: lora_model("demo", targets=("c_attn",)), r"has none of these linear layers, only \['down_proj'"),
        (lambda _: load_adapter_state(lora_model("demo"), adapter_state(lora_model("demo", rank=4))), "another rank"),
    ],
)
def test_what_does_not_fit_is_named(call: Callable, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)
