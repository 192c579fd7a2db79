"""What all snapshots of a trajectory have in common: tensors by name, and how they lie in one flat row of words.

Words [P] uint32 are the float32 bits of all tensors, names sorted, one behind the other; bfloat16 is widened to
float32, whose low 16 bits are then 0.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from .layout import DEPTH, MAX_GROUP

Words = NDArray[np.uint32]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_COUNT = 2**40  # of a frame's weights
MAX_DIMS = 64


@dataclass(frozen=True)
class Schema:
    tensors: dict[str, list[int]]  # name -> shape, names sorted
    dtype: str  # one for all
    layout: str
    group: int  # K
    eps: float  # of the bounded error; 0: lossless

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where in the words each tensor lies."""
        ends = np.cumsum([0, *map(prod, self.tensors.values())], dtype=np.int64).tolist()
        return {name: slice(*pair) for name, pair in zip(self.tensors, pairwise(ends), strict=True)}

    @cached_property
    def count(self) -> int:
        """P, the weights of a snapshot."""
        return sum(map(prod, self.tensors.values()))

    @property
    def zero_bits(self) -> int:
        return 16 if self.dtype == "bfloat16" else 0

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=False).encode()


def schema_of(where: str, tensors: Mapping[str, Tensor], layout: str, group: int, eps: float) -> Schema:
    """The schema of a trajectory that begins with `tensors`. Raises InputError for a type that is not stored."""
    shapes = {name: list(t.shape) for name, t in sorted(tensors.items())}
    name = next(iter(shapes), None)
    dtype = torch.float32 if name is None else tensors[name].dtype
    if dtype not in DTYPES.values():
        raise InputError(f"{where}: tensor {name} is {dtype}, must be torch.float32 or torch.bfloat16")
    if eps and dtype == torch.bfloat16:
        raise InputError(f"{where}: tensor {name} is {dtype}, must be torch.float32 where eps={eps}")
    return Schema(shapes, str(dtype).removeprefix("torch."), layout, group, eps)


def check_tensors(where: str, tensors: Mapping[str, Tensor], schema: Schema) -> None:
    """Raise InputError unless `tensors` have the names, shapes and type of the trajectory."""
    for name in sorted(tensors.keys() | schema.tensors.keys()):
        mine, other = (list(tensors[name].shape) if name in tensors else None), schema.tensors.get(name)
        if mine != other:
            raise InputError(f"{where}: tensor {name} has shape {mine}, in this trajectory it has {other}")
        if tensors[name].dtype != DTYPES[schema.dtype]:
            raise InputError(f"{where}: tensor {name} is {tensors[name].dtype}, must be {DTYPES[schema.dtype]}")


def flatten(tensors: Mapping[str, Tensor], schema: Schema) -> Words:
    """Words [P] of tensors that fit the schema, with any strides; those on another device are copied once, together."""
    ordered = [tensors[name].detach() for name in schema.tensors]
    devices = {t.device for t in ordered}
    if len(devices) == 1 and devices != {torch.device("cpu")}:
        flat = torch.cat([t.reshape(-1) for t in ordered]).cpu()
    else:
        flat = torch.empty(schema.count, dtype=DTYPES[schema.dtype])
        for t, place in zip(ordered, schema.slices.values(), strict=True):
            flat[place].view(t.shape).copy_(t)
    if schema.zero_bits:
        return flat.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) << np.uint32(16)
    return flat.view(torch.int32).numpy().view(np.uint32)


def to_flat(words: Words, schema: Schema) -> Tensor:
    """A flat tensor of the trajectory's type; float32 shares the words' memory."""
    if schema.zero_bits:
        return torch.from_numpy((words >> np.uint32(16)).astype(np.uint16).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(words.view(np.int32)).view(torch.float32)


def parse(where: str, data: bytes) -> Schema:
    """The schema in a file. Raises InputError for anything that a writer would not have written."""
    try:
        value = json.loads(data)
    except (RecursionError, ValueError) as error:
        raise InputError(f"{where}: the schema is not JSON ({error})") from None

    def require(ok: bool, what: str) -> None:
        if not ok:
            raise InputError(f"{where}: the schema has {what}")

    keys = {"tensors", "dtype", "layout", "group", "eps"}
    require(isinstance(value, dict) and value.keys() == keys, f"other keys than {', '.join(sorted(keys))}")
    require(isinstance(value["tensors"], dict), "tensors that are no object")
    for name, shape in value["tensors"].items():
        ok = isinstance(shape, list) and len(shape) <= MAX_DIMS and all(is_count(n, MAX_COUNT) for n in shape)
        require(ok, f"tensor {name!r} of shape {shape!r}")
    require(list(value["tensors"]) == sorted(value["tensors"]), "names that are not sorted")
    require(sum(map(prod, value["tensors"].values())) <= MAX_COUNT, "more weights than a frame holds")
    require(value["dtype"] in list(DTYPES), f"dtype {value['dtype']!r}")
    require(value["layout"] in list(DEPTH), f"layout {value['layout']!r}")
    require(is_count(value["group"], MAX_GROUP) and value["group"] >= 1, f"group {value['group']!r}")
    require(type(value["eps"]) in (int, float) and 0 <= value["eps"] < 1e9, f"eps {value['eps']!r}")
    return Schema(**value)


def is_count(value: Any, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= limit
