"""Loading, LoRA, and the patched model against the one it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nacd_fast.config import ModelConfig
from nacd_fast.data import pack
from nacd_fast.errors import InputError
from nacd_fast.student import Student, adapter_state, add_lora, load_adapter_state, load_model, resolve_device
from tests.oracle import make_rows
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


def test_checkpointing_recomputes_with_the_adapters_of_its_own_forward(tmp_path: Path) -> None:
    """Two losses at two thetas before one backward pass, as in a retained unroll."""
    path, batch = make_model(tmp_path), pack(make_rows([(2, 7), (3, 1)]), 0)
    grads = []
    for checkpointing in (False, True):
        student = Student(lora_model(path), checkpointing=checkpointing)
        size = sum(shape.numel() for shape in student.shapes.values())
        thetas = [
            (0.1 * torch.randn(size, generator=torch.Generator().manual_seed(i))).requires_grad_() for i in (1, 2)
        ]
        losses = [student.loss(student.unflatten(theta), None, batch) for theta in thetas]
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


def test_gpt_2_gets_adapters_on_its_attention(tmp_path: Path) -> None:
    """Its layers hold their weights transposed, which peft's own forward must know; attention has no c_fc."""
    student = lora_model(make_model(tmp_path, "gpt2"))
    names = {name.split(".transformer.h.")[1].split(".lora")[0] for name in adapter_state(student)}
    assert names == {f"{i}.attn.{layer}" for i in (0, 1) for layer in ("c_attn", "c_proj")}
    config = student.peft_config["default"]
    assert config.fan_in_fan_out and config.target_modules == {"c_attn", "attn.c_proj"}
    assert all(layer.fan_in_fan_out for name, layer in student.named_modules() if name.endswith("c_attn"))


def test_as_many_prompts_as_a_batch_has_room_for() -> None:
    student, batch = Student(lora_model("demo")), pack(make_rows([(2, 2), (1, 1)]), 2)
    prompts = torch.zeros(2, 3, student.embedding.shape[1])
    for given, count in ((None, 0), (prompts, 6)):
        with pytest.raises(ValueError, match=f"^{count} prompt tokens for a batch packed with room for 4$"):
            student.loss({}, given, batch)


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
        (too_many_tokens, "the tokenizer has 2049 tokens, the model only 2048"),
        (lambda _: lora_model("demo", targets=("c_attn",)), r"has none of these linear layers, only \['down_proj'"),
        (lambda _: load_adapter_state(lora_model("demo"), adapter_state(lora_model("demo", rank=4))), "another rank"),
    ],
)
def test_what_does_not_fit_is_named(call: Callable, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)
