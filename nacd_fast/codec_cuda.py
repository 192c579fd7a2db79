"""Frames decoded on an NVIDIA GPU: bit for bit what codec.decode gives, in words on the device.

The frame crosses to the GPU as it is stored, and its references are there already:

    frame = upload(data, device)                            # host: head and checksums; one copy, queued
    words = decode_cuda(frame, (a, b))                      # int32 [P]; .view(torch.float32) are the weights
    words = decode_cuda(frame, (a, b), status=status)       # no wait for the GPU; check(status) once behind the last

Words are int32 tensors, for torch adds and compares no uint32. What the host checks and what the GPU checks is told in
csrc/codec_cuda.h and csrc/block_gpu.h. Everything is queued on the device's current stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from . import native
from .codec import PREDICTORS, Bytes, CodecError, FrameInfo, chosen_blocks, read_info

NAME = "_codec_cuda"
LEAST_CAPABILITY = (8, 0)  # what it is compiled for: CMakeLists.txt


@dataclass(frozen=True, eq=False)
class DeviceFrame:
    """Blocks of a frame on a GPU, their checksums verified."""

    info: FrameInfo
    blocks: range
    data: Tensor  # [bytes] uint8 on the device: the plan, then the blocks' payload, then SLACK
    plan_bytes: int
    shared_bytes: int  # of the memory that a thread block takes

    @property
    def count(self) -> int:
        return len(self.info.weights(self.blocks))


def missing(device: torch.device | None = None) -> str:
    """Why frames cannot be decoded on the device (None: the current one); empty where they can."""
    module = native.load(NAME)
    if module is None:
        return f"nacd_fast.{NAME} was not built; `make build` needs nvcc"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if (reason := module.unusable()) is not None:
        return f"CUDA: {reason}"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}, must be at least 8.0"
    return ""


def available(device: torch.device | None = None) -> bool:
    return not missing(device)


def explain(device: torch.device | None = None) -> str:
    """One line for logs and reports: where frames for the device are decoded."""
    reason = missing(device)
    return f"codec on CUDA: on the CPU ({reason})" if reason else "codec on CUDA: on the GPU"


def upload(frame: Bytes, device: torch.device, *, blocks: range | None = None) -> DeviceFrame:
    """The frame that `frame` begins with, or some of its blocks, on the device. CodecError if bytes are not as written.

    The host's copy may be dropped or changed as soon as this returns.
    """
    module = _module()
    info = read_info(frame)
    blocks = chosen_blocks(frame, info, blocks)
    try:
        plan, begin, end, shared_bytes = module.plan(frame, blocks.start, len(blocks))
        staged = torch.empty(
            len(plan) + end - begin + module.SLACK, dtype=torch.uint8, pin_memory=device.type == "cuda"
        )
        room = staged.numpy()
        room[: len(plan)] = plan
        payload = room[len(plan) : len(plan) + end - begin]
        payload[:] = frame[begin:end]
        module.check_payload(frame, payload, blocks.start, len(blocks))
    except ValueError as error:
        raise CodecError(str(error)) from None
    room[-module.SLACK :] = 0
    return DeviceFrame(info, blocks, staged.to(device, non_blocking=True), len(plan), shared_bytes)


def decode_cuda(
    frame: DeviceFrame,
    references: Sequence[Tensor] = (),
    *,
    out: Tensor | None = None,
    base_only: bool = False,
    status: Tensor | None = None,
) -> Tensor:
    """The frame's words [P] int32, on its device; references and out hold the words of its blocks, and no others.

    Waits for the GPU and raises CodecError for malformed blocks, unless `status` (new_status) is given: then check it
    before the words are used for anything but further frames.
    """
    info, device = frame.info, frame.data.device
    if len(references) != info.predictor:
        raise ValueError(f"{len(references)} references, must be {info.predictor} ({PREDICTORS[info.predictor]})")
    if out is None:
        out = torch.empty(frame.count, dtype=torch.int32, device=device)
    for name, words in (("out", out), *zip(("reference a", "reference b"), references)):
        _check_words(name, words, frame)
    if any(_overlap(out, reference) for reference in references):
        raise ValueError("out overlaps a reference")
    own = new_status(device) if status is None else status
    a, b, *_ = (*(reference.data_ptr() for reference in references), 0, 0)
    plan = frame.data.data_ptr()
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        _module().launch(
            plan,
            plan + frame.plan_bytes,
            a,
            b,
            out.data_ptr(),
            base_only,
            len(frame.blocks),
            frame.shared_bytes,
            own.data_ptr(),
            stream,
        )
    if status is None:
        check(own)
    return out


def new_status(device: torch.device) -> Tensor:
    """For decode_cuda: what the first malformed block leaves there. [1] int32."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def check(status: Tensor) -> None:
    """Waits for the GPU; CodecError if a frame that was decoded with `status` has a malformed block."""
    if value := int(status.item()):
        raise CodecError(_module().describe(value))


def _module() -> ModuleType:
    module = native.load(NAME)
    if module is None:
        raise ImportError(f"nacd_fast.{NAME} was not built; run `make build` where there is an nvcc")
    return module


def _check_words(name: str, words: Tensor, frame: DeviceFrame) -> None:
    if words.dtype != torch.int32 or words.shape != (frame.count,) or not words.is_contiguous():
        kind = f"{words.dtype} {list(words.shape)}"
        raise ValueError(f"{name} is {kind}, must be contiguous torch.int32 [{frame.count}]")
    if words.device != frame.data.device:
        raise ValueError(f"{name} is on {words.device}, must be on {frame.data.device}, as the frame")


def _overlap(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() < y.data_ptr() + 4 * len(y) and y.data_ptr() < x.data_ptr() + 4 * len(x)
