"""How a launch of the GPU kernels is cut: lanes, rows and stripes, from shapes and the kind of device.

It knows no arrays and no MLX. The rule and the sweeps behind it are in metal/README.md.
"""

from collections.abc import Sequence
from typing import NamedTuple

SIMD = 32  # lanes of a simdgroup (warp)
OUTPUTS = 32  # of one lane: 64 were no faster, and halve the lanes that fit
SLICE = 8  # sums per lane in threadgroup memory at one time: 12 KB at 384 threads
LEAST_STRIPE = 32  # channels: below, collecting costs more than multiplying
LEAST_WEIGHTS = 1 << 20  # below, one launch takes less time than two, however few cores it fills
MOST_LISTED = 2048  # channels: 8 KB of list

# Metal: a tile is a whole band up to 8,192 outputs, so that no line of codes, scales or biases is
# read by two threadgroups. 384 threads run at any register count that Metal's compiler may choose.
METAL_LANES, METAL_THREADS = 256, 384
# CUDA: a warp on 1,024 outputs reads whole 32-byte sectors of scales; more lanes gained nothing.
MOST_LANES, MOST_THREADS = {"cuda": 32}, {"cuda": 256}
# Enough threadgroups for the GPU's cores; each stripe costs a write and a read of all sums. CUDA: two for
# each of an H200's multiprocessors. One is enough while independent launches fill the rest, as in a
# benchmark of one product; in a model each waits for the one before.
THREADGROUPS = {"cuda": 264, "p": 32, "g": 64, "s": 96, "d": 192}


class Geometry(NamedTuple):
    """One cut of sparse_gemv.metal; the fields are its template integers, and `stripe`."""

    outputs: int  # of one lane: 32, or 64 where 64 divides every band
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


def choose(kind: str, bands: Sequence[tuple[int, int]], inputs: int, precise: bool = False) -> Geometry:
    """The geometry for projections with these (band, number of bands) and `inputs` channels.

    kind: "cuda", or Metal's GPU class: "p", "g", "s" or "d" for phone, base and Pro, Max, Ultra. precise: x
    is float32, so that the rounding of sums shows; in 16 bits the result's own hides it.
    """
    widest = _units(max(band for band, _ in bands))
    parts = -(-widest // MOST_LANES.get(kind, METAL_LANES))
    lanes = -(-widest // parts)
    # Narrow tiles share a simdgroup; else the rows are those of a tile of whole simdgroups.
    rows = max(
        1, MOST_THREADS.get(kind, METAL_THREADS) // (lanes if lanes <= 16 else -(-lanes // SIMD) * SIMD)
    )
    threads = -(-lanes * rows // SIMD) * SIMD
    tiles = sum(-(-_units(band) // lanes) * number for band, number in bands)
    stripes = max(1, min(inputs // LEAST_STRIPE, THREADGROUPS[kind] // tiles))
    if tiles * lanes * OUTPUTS * inputs <= LEAST_WEIGHTS:
        stripes = 1
    stripe = -(-inputs // stripes)
    passes = -(-stripe // MOST_LISTED)
    listed = -(-stripe // (passes * threads)) * threads
    # Subnormal codes need no conversion, but Apple GPUs flush them to zero.
    unroll, decode = (4, 2) if kind == "cuda" else (2, 1)
    if precise:
        decode = 0  # codes around their middle
    return Geometry(OUTPUTS, lanes, rows, unroll, listed, SLICE, decode, stripe)


def _units(band: int) -> int:
    return -(-band // OUTPUTS)
