"""Expert trajectories on disk: snapshots of the adapters by optimiser step, appended while training, read in any order.

    records.py   the bytes of a file: records, and the scan that finds them
    schema.py    named tensors as one flat row of words
    layout.py    which snapshot is coded against which
    index.py     what the two files of a trajectory hold
    decoder.py   frames -> words, references first
    bounds.py    the bounded-error mode
    files.py     writes that last
    writer.py, reader.py, prefetch.py, device.py
    command.py, table.py, convert.py    `nacd store`

The codec of one frame is nacd_fast/codec.py; csrc/FORMAT.md describes every byte.
"""

from .reader import TrajectoryStore
from .writer import TrajectoryWriter

__all__ = ["TrajectoryStore", "TrajectoryWriter"]
