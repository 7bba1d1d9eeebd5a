"""How a launch of the GPU kernels is cut: lanes, rows and stripes, from shapes and the kind of device.

It knows no arrays and no MLX. The rule and the sweeps behind it are in metal/README.md.
"""

from collections.abc import Sequence
from typing import NamedTuple

SIMD = 32  # lanes of a simdgroup (warp)


class Geometry(NamedTuple):
    """One cut of sparse_gemv.metal; the fields are its template integers, and `stripe`."""

    outputs: int  # of one lane, 32 or 64
    lanes: int  # side by side on one channel
    rows: int  # channels in work at one time
    unroll: int  # channels that a lane loads before it multiplies
    list: int  # channels collected at one time
    slice: int  # sums per lane that are added over the rows at one time
    decode: int  # 0 exponent and subtract, 1 convert, 2 subnormal
    stripe: int  # channels of one threadgroup

    @property
    def threads(self) -> int:
        return -(-self.lanes * self.rows // SIMD) * SIMD

    @property
    def tile(self) -> int:
        return self.lanes * self.outputs

    def tiles(self, band: int) -> int:
        return -(-band // self.tile)

    def stripes(self, inputs: int) -> int:
        return -(-inputs // self.stripe)


def choose(kind: str, bands: Sequence[tuple[int, int]], inputs: int) -> Geometry:
    """The geometry for projections with these (band, number of bands) and `inputs` channels.

    kind: "metal" or "cuda".
    """
    widest = max(band for band, _ in bands)
    lanes = min(32, widest // 32)
    rows = max(1, 256 // lanes)
    if lanes < SIMD and SIMD % lanes == 0:
        rows = max(rows, SIMD // lanes)
    tiles = sum(-(-band // (lanes * 32)) * number for band, number in bands)
    stripes = max(1, min(inputs // 128, 528 // tiles))
    stripe = -(-inputs // stripes)
    threads = -(-lanes * rows // SIMD) * SIMD
    collected = threads * max(1, min(4, -(-stripe // threads)))
    return Geometry(32, lanes, rows, 2, collected, 8, 0 if kind == "metal" else 2, stripe)
