"""The student: a Hugging Face causal LM with LoRA adapters (peft), as a function that can be differentiated twice.

`load_model`, `add_lora` and `adapter_state` serve every stage. `Student` is for the matching: its `loss` is a pure
function of the adapters and the prompts, whose modules run on the ops of nacd_kernels (families.py).
"""

import hashlib
import json
import struct
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from nacd_kernels import linear_cross_entropy

from .artifacts import file_digest
from .config import ModelConfig
from .data import Packed
from .errors import InputError
from .families import DROPOUTS, family_of, full_name, use_twice_differentiable_ops
from .forwards import ADAPTER
from .rows import first_line as first_line

DEMO = {"demo": "model", "demo-sibling": "sibling"}
MODEL_FILES = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja", ".gguf")
LOAD_ERRORS = (  # what transformers and the readers below it raise on a broken model folder
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    EOFError,
    struct.error,
    UnpicklingError,
    SafetensorError,
    StrictDataclassError,
)


def resolve_model(path: str) -> str:
    """Folder of an embedded model by its name; any other path as it is."""
    return str(Path(__file__).parent / "demo" / DEMO[path]) if path in DEMO else path


def resolve_device(device: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises InputError on a device that this machine lacks."""
    gpus = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))] if torch.cuda.is_available() else []
    if device not in ("auto", "cpu", *gpus):
        raise InputError(f"model.device={device!r}: must be one of {', '.join(('auto', 'cpu', *gpus))} on this machine")
    return torch.device((gpus or ["cpu"])[0] if device == "auto" else device)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model. Raises InputError if there is none."""
    where = resolve_model(path)
    if Path(where).is_dir() and not any(
        (Path(where) / name).exists()
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    ):
        raise InputError(f"{where}: no tokenizer in this model folder (tokenizer.json, tokenizer.model or vocab.json)")
    try:
        return AutoTokenizer.from_pretrained(where)
    except Exception as error:  # on a bad tokenizer.json the tokenizers library raises no type of its own
        raise InputError(f"{path}: its tokenizer does not load ({first_line(error)})") from None


def load_model(
    path: str, dtype: str = "float32", device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM, frozen and without dropout, and its tokenizer.

    path: hub name, folder, `demo` or `demo-sibling`. Raises InputError if either is missing or does not load, and if
    the files lack one of the model's weights.
    """
    where, place = resolve_model(path), resolve_device(device)
    tokenizer = load_tokenizer(path)
    if Path(where).is_dir() and not (Path(where) / "config.json").exists():
        raise InputError(f"{where}: no config.json in this model folder")
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            where, dtype=getattr(torch, dtype), output_loading_info=True, ignore_mismatched_sizes=True
        )
    except LOAD_ERRORS as error:
        raise InputError(f"{path}: the model does not load ({first_line(error)})") from None
    check_weights(path, found)
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise InputError(f"{path}: the tokenizer has {len(tokenizer)} tokens, the model only {known}")
    disable_dropout(model)
    return model.requires_grad_(False).to(place), tokenizer


def check_weights(path: str, found: Mapping[str, Any]) -> None:
    """Every weight came from the files; transformers only warns, and draws the others at random."""
    for name in sorted(found["missing_keys"]):
        raise InputError(f"{path}: the model's files lack the weight {name}")
    for name, shape, expected in sorted(found["mismatched_keys"]):
        raise InputError(
            f"{path}: the weight {name} has the shape {list(shape)}, its config.json says {list(expected)}"
        )


def model_digest(path: str) -> str:
    """What identifies a model's weights and tokenizer: SHA-256 over a folder's files, or a hub model's commit."""
    where = Path(resolve_model(path))
    if not where.is_dir():
        try:
            return str(getattr(AutoConfig.from_pretrained(path), "_commit_hash", None))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: the model does not load ({first_line(error)})") from None
    files = sorted(p for p in where.iterdir() if p.suffix in MODEL_FILES)
    return _files_digest(tuple((p, p.stat().st_size, p.stat().st_mtime_ns) for p in files))


@cache
def _files_digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Of names and contents; sizes and times are there to tell the cache of a change."""
    digests = {path.name: file_digest(path) for path, _, _ in files}
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def disable_dropout(model: nn.Module) -> None:
    """Every dropout probability to 0, in modules and where a forward reads it from an attribute or the config."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name in DROPOUTS:
                if isinstance(getattr(holder, name, None), float):
                    setattr(holder, name, 0.0)


def add_lora(model: PreTrainedModel, config: ModelConfig, seed: int) -> PeftModel:
    """LoRA adapters on the linear layers named in config.targets.

    float32, B = 0, A Kaiming-uniform drawn from `seed`. Raises InputError if the model has none of these layers.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    targets = sorted(t for t in config.targets if any(f".{name}".endswith(f".{t}") for name in linear))
    if not targets:
        names = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise InputError(
            f"model.targets={list(config.targets)}: {config.path} has none of these linear layers, only {names}"
        )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notices of libraries to libraries
        torch.manual_seed(seed)
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.lora_alpha,
            target_modules=targets,
            lora_dropout=0.0,
            bias="none",
            fan_in_fan_out=any(isinstance(m, Conv1D) for m in linear.values()),  # peft corrects it layer by layer
            task_type="CAUSAL_LM",
        )
        device = model.device
        peft_model = get_peft_model(model.to("cpu"), lora, adapter_name=ADAPTER).to(device)
    for parameter in adapter_parameters(peft_model).values():
        parameter.data = parameter.data.float()
    return peft_model


def adapter_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """The LoRA factors by their full names, sorted."""
    return {name: p for name, p in sorted(model.named_parameters()) if ".lora_A." in name or ".lora_B." in name}


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """A detached float32 copy of the LoRA factors on the CPU, by name, sorted."""
    return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in adapter_parameters(model).items()}


def load_adapter_state(model: PeftModel, state: Mapping[str, Tensor]) -> None:
    """Copy `state` (as from adapter_state) into the model. Raises InputError if names or shapes differ."""
    parameters = adapter_parameters(model)
    check_same_adapters({name: p.shape for name, p in parameters.items()}, {name: t.shape for name, t in state.items()})
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(state[name])


def check_same_adapters(mine: Mapping[str, torch.Size], other: Mapping[str, torch.Size]) -> None:
    for name in sorted(mine.keys() | other.keys()):
        if mine.get(name) != other.get(name):
            raise InputError(
                f"adapter {name}: shape {other.get(name)} does not fit the model's {mine.get(name)} "
                "(another rank, target list or model)"
            )


def embedding_table(model: PreTrainedModel) -> Tensor:
    """What the decoder reads for each token of the vocabulary [V, D]; Gemma scales the weight that it stores."""
    layer: Any = model.get_input_embeddings()
    if type(layer) is nn.Embedding:
        return layer.weight.detach()
    with torch.no_grad():
        return layer(torch.arange(layer.num_embeddings, device=layer.weight.device))


def max_positions(model: PreTrainedModel | PeftModel) -> int:
    """Longest sequence the model takes."""
    return int(getattr(model.config, "max_position_embeddings", 2**31 - 1))


# --- the student as a pure function ---------------------------------------------------------------------------------


class Student:
    """The loss of a batch as a function of the adapters and the prompts, twice differentiable in both.

    Takes the PEFT model over: its modules' forwards now run on the ops of nacd_kernels.
    """

    def __init__(self, model: PeftModel, *, checkpointing: bool = False):
        base = model.get_base_model()
        family = family_of(base)
        self.model, self.base = model, base
        self.backbone: nn.Module = base.get_decoder()
        self.shapes = {name: p.shape for name, p in adapter_parameters(model).items()}
        self.lora_layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
        self._check_layers()
        use_twice_differentiable_ops(base, family, checkpointing=checkpointing)
        base.eval()
        self.embedding = embedding_table(base)
        """The vocabulary embedding table [V, D], in the space of the prompts."""
        self.head: Any = base.get_output_embeddings()
        self.softcap: float | None = getattr(base.config, family.softcap) if family.softcap else None

    def _check_layers(self) -> None:
        """`loss` runs the decoder's adapters only, and a head that is one linear layer."""
        inside = set(self.backbone.modules())
        for name, layer in self.lora_layers.items():
            if layer not in inside:
                name = name.removeprefix("base_model.model.")
                raise InputError(f"model.targets: {name} is outside the decoder, where matching learns no adapters")
        head = type(self.base.get_output_embeddings())
        if head is not nn.Linear:
            raise InputError(f"the output head is a {full_name(head)}: matching knows a linear layer only")

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def flatten(self, state: Mapping[str, Tensor]) -> Tensor:
        """Adapters by name -> one float32 vector theta [P] on the student's device."""
        check_same_adapters(self.shapes, {name: t.shape for name, t in state.items()})
        return torch.cat([state[name].reshape(-1) for name in self.shapes]).to(self.device, torch.float32)

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """theta [P] -> adapters by name, as views."""
        pieces = theta.split([shape.numel() for shape in self.shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}

    def hidden(self, adapters: Mapping[str, Tensor], prompts: Tensor | None, batch: Packed) -> Tensor:
        """The decoder's last hidden states of a packed batch [P, D]; arguments as in `loss`."""
        given = 0 if prompts is None else prompts.shape[0] * prompts.shape[1]
        if given != len(batch.prompt_places):
            raise ValueError(f"{given} prompt tokens for a batch packed with room for {len(batch.prompt_places)}")
        x = torch.nn.functional.embedding(batch.input_ids, self.embedding)
        if prompts is not None:
            x = x.index_copy(0, batch.prompt_places, prompts.to(x.dtype).flatten(0, 1))
        for name, layer in self.lora_layers.items():
            layer.factors = adapters[f"{name}.lora_A.{ADAPTER}.weight"], adapters[f"{name}.lora_B.{ADAPTER}.weight"]
        return self.backbone(
            inputs_embeds=x[None],
            position_ids=batch.position_ids[None],
            cu_seqlens=batch.cu_seqlens,
            use_cache=False,
        ).last_hidden_state[0]

    def loss(
        self, adapters: Mapping[str, Tensor], prompts: Tensor | None, batch: Packed, *, retain: bool = False
    ) -> Tensor:
        """Mean cross-entropy over the supervised tokens of a packed batch.

        adapters: by the names of `shapes`; prompts [B, k, D] stand in front of the embedded samples: as many as the
        batch was packed for, None for k = 0. retain: keep the logits where the graph is kept (`linear_cross_entropy`).
        """
        weight, bias = self.head.weight, self.head.bias
        hidden = self.hidden(adapters, prompts, batch)
        return linear_cross_entropy(hidden, weight, batch.targets, bias=bias, softcap=self.softcap, retain=retain)
