"""The numbers that a launch hands to its kernels: Python packs these records, metal/settings.h reads them.

The fields are written here alone: `metal_text` declares them for the kernels, `pack` lays them out.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple, get_type_hints

import mlx.core as mx

# Numbers in the array, 16 KB: MLX's CUDA allocator hands smaller arrays out of buffers that the host wrote
# before, which lie in managed memory; where the host touches their page again, a kernel waits 10 us for it.
LEAST_NUMBERS = 4096
# A one in both halves of a word. Kernels read it, since of a mask that it knows a compiler makes two, one for
# each half of the masked word.
BOTH = 0x00010001


class LaunchSettings(NamedTuple):
    """What all threadgroups of a launch read first."""

    inputs: int  # channels of x
    stripe: int  # channels of one threadgroup
    positions: int  # numbers of one stripe in `partials`: the sums of all tiles, and the counts
    projections: int
    both: int  # BOTH
    eps: float  # added to the mean square of x before it is normalized


class ProjectionSettings(NamedTuple):
    """One projection of the launch."""

    first_tile: int  # its first among the tiles of all projections
    band: int  # outputs of a stored band
    tiles: int  # of a band
    outputs: int
    weight: int  # where each array begins in `packed`, in uint32 words
    scales: int
    biases: int


WORDS = {int: "uint", float: "float"}  # 4 bytes each


def metal_text() -> str:
    """The records as Metal declares them: the same fields in the same order."""
    text = ""
    for record in (LaunchSettings, ProjectionSettings):
        fields = "".join(f"  {WORDS[kind]} {name};\n" for name, kind in get_type_hints(record).items())
        text += f"struct {record.__name__} {{\n{fields}}};\n"
    return text


def pack(
    launch: LaunchSettings, projections: Sequence[ProjectionSettings], floats: Sequence[mx.array]
) -> mx.array:
    """The uint32 array of a launch, evaluated, so that any thread may use it.

    floats: float32 numbers behind the records, in the order that metal/settings.h says.
    """
    words = _words(launch) + tuple(word for one in projections for word in _words(one))
    records = mx.array(words, mx.uint32)
    parts = [records.view(mx.float32), *floats]
    missing = LEAST_NUMBERS - sum(part.size for part in parts)
    array = mx.concatenate([*parts, mx.zeros(max(missing, 0))]).view(mx.uint32)
    mx.eval(array)
    return array


def _words(record: LaunchSettings | ProjectionSettings) -> tuple[int, ...]:
    kinds = get_type_hints(type(record)).values()
    form = "".join("f" if kind is float else "I" for kind in kinds)
    return struct.unpack(f"={len(record)}I", struct.pack(f"={form}", *record))
