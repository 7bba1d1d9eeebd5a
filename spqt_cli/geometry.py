"""How a launch of the GPU kernels is cut: lanes, rows and stripes, from shapes and the kind of device.

It knows no arrays and no MLX. The rule and the sweeps behind it are in metal/README.md.
"""

from collections.abc import Sequence
from typing import NamedTuple

LANE_OUTPUTS = 32  # outputs that one lane owns
SIMD = 32  # lanes of a simdgroup (warp)


class Geometry(NamedTuple):
    """One cut of sparse_gemv.metal; the fields are its template integers, and `stripe`."""

    lanes: int  # side by side on one channel; a tile is lanes * 32 outputs
    rows: int  # channels in work at one time
    unroll: int  # channels that a lane loads before it multiplies
    list: int  # channels collected at one time
    slice: int  # outputs per lane that are summed over the rows at one time
    decode: int  # 0 exponent and subtract, 1 convert, 2 subnormal
    stripe: int  # channels of one threadgroup

    @property
    def threads(self) -> int:
        return -(-self.lanes * self.rows // SIMD) * SIMD

    def tiles(self, band: int) -> int:
        return -(-band // (self.lanes * LANE_OUTPUTS))

    def stripes(self, inputs: int) -> int:
        return -(-inputs // self.stripe)


def choose(kind: str, bands: Sequence[tuple[int, int]], inputs: int) -> Geometry:
    """The geometry for projections with these (band, number of bands) and `inputs` channels.

    kind: "metal" or "cuda".
    """
    widest = max(band for band, _ in bands)
    lanes = min(32, widest // LANE_OUTPUTS)
    rows = max(1, 256 // lanes)
    if lanes < SIMD and SIMD % lanes == 0:
        rows = max(rows, SIMD // lanes)
    tiles = sum(-(-band // (lanes * LANE_OUTPUTS)) * number for band, number in bands)
    stripes = max(1, min(inputs // 128, 1056 // tiles))
    stripe = -(-inputs // stripes)
    threads = -(-lanes * rows // SIMD) * SIMD
    collected = threads * max(1, min(4, -(-stripe // threads)))
    return Geometry(lanes, rows, 4, collected, 8, 0 if kind == "metal" else 2, stripe)
