"""Snapshots decoded on a GPU: frames cross to it as they are stored, and keys stay there.

decoder.py's recursion with codec_cuda in the place of codec. The host verifies each frame's checksums before it is
sent; the decoded words are not compared with theirs, as the CPU does at every read but with base_only.
"""

import torch
from torch import Tensor

from .. import codec_cuda
from ..codec import CodecError
from ..errors import InputError
from .decoder import Decoder, FrameCache


class DeviceDecoder:
    """The snapshots of `decoder`'s index, on `device`. Decoded keys stay there, in the cache."""

    def __init__(self, decoder: Decoder, device: torch.device, cache: FrameCache[Tensor]):
        self.decoder, self.device, self.cache = decoder, device, cache

    def flat(self, step: int, *, base_only: bool = False) -> Tensor:
        """The snapshot [P], of the trajectory's type, in memory of its own. Waits for the GPU."""
        made: dict[int, Tensor] = {}
        status = codec_cuda.new_status(self.device)
        try:
            words = self.decode(step, made, status, base_only)
            codec_cuda.check(status)
        except CodecError as error:
            path = self.decoder.index.frames[step].path
            raise InputError(f"{path}: the snapshot of step {step}, or one that it is coded against: {error}") from None
        self.keep(made)
        if self.decoder.schema.zero_bits:
            return (words >> 16).to(torch.int16).view(torch.bfloat16)
        return words.view(torch.float32)

    def decode(self, step: int, made: dict[int, Tensor], status: Tensor, base_only: bool) -> Tensor:
        """Words [P] int32, queued on the GPU: to be used after `status` was checked.

        `made` collects its references, which must live until then.
        """
        place = self.decoder.index.frames[step]
        references = [self.reference(other, made, status) for other in place.record.references]
        frame = codec_cuda.upload(self.decoder.read_frame(place, self.decoder.all), self.device)
        return codec_cuda.decode_cuda(frame, references, base_only=base_only, status=status)

    def reference(self, step: int, made: dict[int, Tensor], status: Tensor) -> Tensor:
        if step not in made:
            kept = self.cache.get(step, self.decoder)
            made[step] = self.decode(step, made, status, base_only=False) if kept is None else kept
        return made[step]

    def keep(self, made: dict[int, Tensor]) -> None:
        """Of what a checked read has used, the keys."""
        for step, words in made.items():
            if not self.decoder.index.frames[step].record.references:
                self.cache.put(step, words, self.decoder, key=True)
