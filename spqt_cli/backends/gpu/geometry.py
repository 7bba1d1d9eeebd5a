"""How a launch of the GPU kernels is cut: lanes, rows and stripes, from shapes and the kind of device.

It knows no arrays and no MLX. The rule and the sweeps behind it are in metal/README.md.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

SIMD = 32  # lanes of a simdgroup (warp)
OUTPUTS = 32  # of one lane: 64 were no faster, and halve the lanes that fit
SUBTRACT, CONVERT, SUBNORMAL, HALVES = 0, 1, 2, 3  # how a code becomes a float: DECODE of sparse_gemv.metal
SLICE = 8  # sums per lane in threadgroup memory at one time: 12 KB at 384 threads
LEAST_STRIPE = 32  # channels: below, collecting costs more than multiplying
LEAST_WEIGHTS = 1 << 20  # below, one launch takes less time than two, however few cores it fills
FEWEST_LANES = 4  # of a tile of experts: 128 outputs, 64 bytes of 4-bit codes of a channel
MOST_LISTED = 2048  # channels: 8 KB of list

# Most lanes of a tile, and threads. Wide: a whole band up to 8,192 outputs, so that no line of codes, scales
# or biases is read by two threadgroups; 384 threads run at any register count that Metal's compiler may
# choose. Narrow: a warp on 1,024 outputs reads whole 32-byte sectors of scales; on CUDA more lanes gained
# nothing.
TILES = {"wide": (256, 384), "narrow": (32, 256)}
# What a class may take, the first unless tiles.py measured another to be faster; all not named: both.
TILES_OF = {"cuda": ("narrow",)}
# Enough threadgroups for the GPU's cores; each stripe costs a write and a read of all sums. CUDA: two for
# each of an H200's multiprocessors. One is enough while independent launches fill the rest, as in a
# benchmark of one product; in a model each waits for the one before.
THREADGROUPS = {"cuda": 264, "p": 32, "g": 64, "s": 96, "d": 192}


class Cut(Protocol):
    """How any of the products is cut into tiles of outputs and stripes of channels."""

    @property
    def stripe(self) -> int: ...  # pragma: no cover
    @property
    def tile(self) -> int: ...  # pragma: no cover
    def tiles(self, band: int, /) -> int: ...  # pragma: no cover


class Geometry(NamedTuple):
    """One cut of sparse_gemv.metal; the fields are its template integers, and `stripe`."""

    outputs: int  # of one lane: 32, or 64 where 64 divides every band
    lanes: int  # side by side on one channel
    rows: int  # channels in work at one time
    unroll: int  # channels that a lane loads before it multiplies
    list: int  # channels collected at one time
    slice: int  # sums per lane that are added over the rows at one time
    decode: int
    stripe: int  # channels of one threadgroup
    padded: int = 1  # 1: lists are filled up so that all rows take equally many turns; 0: the last is clipped

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


def tiles_of(kind: str) -> tuple[str, ...]:
    """The names of TILES that a class may take."""
    return TILES_OF.get(kind, tuple(TILES))


def choose(
    kind: str, bands: Sequence[tuple[int, int]], inputs: int, precise: bool = False, tile: str = ""
) -> Geometry:
    """The geometry for projections with these (band, number of bands) and `inputs` channels.

    kind: "cuda", or Metal's GPU class: "p", "g", "s" or "d" for phone, base and Pro, Max, Ultra. precise: x
    is float32, so that the rounding of sums shows; in 16 bits the result's own hides it. tile: of TILES, the
    class's first unless said.
    """
    tile = tile or tiles_of(kind)[0]
    lanes = _widest(tile, bands)
    tiles = _tiles(bands, lanes)
    stripes = max(1, min(inputs // LEAST_STRIPE, THREADGROUPS[kind] // tiles))
    if tiles * lanes * OUTPUTS * inputs <= LEAST_WEIGHTS:
        stripes = 1
    return _cut(kind, tile, lanes, -(-inputs // stripes), precise)


def choose_experts(
    kind: str, bands: Sequence[tuple[int, int]], inputs: int, pairs: int, precise: bool = False
) -> Geometry:
    """As `choose`, for sparse_experts.metal and so many pairs of a row and an expert: in one stripe, and so
    in narrower tiles where there are too few threadgroups.
    """
    tile = tiles_of(kind)[0]
    lanes = _widest(tile, bands)
    while lanes > FEWEST_LANES and _tiles(bands, lanes) * pairs < THREADGROUPS[kind]:
        lanes = max(FEWEST_LANES, -(-lanes // 2))
    return _cut(kind, tile, lanes, inputs, precise)


def _widest(tile: str, bands: Sequence[tuple[int, int]]) -> int:
    """The lanes of the widest tile."""
    widest = _units(max(band for band, _ in bands))
    return -(-widest // -(-widest // TILES[tile][0]))


def _tiles(bands: Sequence[tuple[int, int]], lanes: int) -> int:
    return sum(-(-_units(band) // lanes) * number for band, number in bands)


def _cut(kind: str, tile: str, lanes: int, stripe: int, precise: bool) -> Geometry:
    # Narrow tiles share a simdgroup; else the rows are those of a tile of whole simdgroups.
    rows = max(1, TILES[tile][1] // (lanes if lanes <= 16 else -(-lanes // SIMD) * SIMD))
    threads = -(-lanes * rows // SIMD) * SIMD
    passes = -(-stripe // MOST_LISTED)
    listed = -(-stripe // (passes * threads)) * threads
    # Subnormal codes need no conversion, which costs an Apple GPU four times a mask. Those of 32 bits it
    # flushes to zero, those of 16 it keeps.
    unroll, decode, padded = (4, SUBNORMAL, 0) if kind == "cuda" else (2, HALVES, 1)
    if precise:
        decode = SUBTRACT  # codes around their middle
    return Geometry(OUTPUTS, lanes, rows, unroll, listed, SLICE, decode, stripe, padded)


def _units(band: int) -> int:
    return -(-band // OUTPUTS)


# For few rows: rows of x in one threadgroup -> outputs of one lane, lanes side by side at most, channels
# loaded ahead, blocks that an SM is to hold. A lane holds outputs times rows sums; 64 leave registers for two
# blocks of 256 threads on an SM, and fit an Apple GPU's 128; with 128 sums and two blocks ptxas spills. Swept
# at 28672x8192 on an H200: 8 rows took 172 us, with 32 lanes 192, with four channels ahead 209.
FEW_ROWS = {
    "cuda": {2: (16, 32, 4, 2), 4: (16, 128, 4, 2), 8: (8, 128, 8, 2)},
    "metal": {2: (16, 256, 2, 0), 4: (16, 256, 2, 0), 8: (8, 256, 2, 0)},
}
FEW_THREADS = 256
FEW_LISTED = 4096  # channels times rows of x: 16 KB of values
LISTS = 8  # spans of a pass, as in sparse_rows.metal
IDLE = 0.1  # of the lanes, at most: narrower tiles where the band leaves more without outputs

# For many rows: rows of x in one threadgroup -> outputs of one lane, threads, simdgroups with the same
# outputs, channels of x in threadgroup memory, steps of 16 channels loaded ahead, blocks that an SM is to
# hold. Wide lanes load 16 bytes at once and few scales, where their sums, outputs times rows over 4, leave
# room. No spills by ptxas (sm_90, 4 bits).
MANY_ROWS = {
    8: (16, 128, 2, 512, 2, 4),
    16: (16, 128, 2, 256, 2, 3),
    32: (8, 128, 2, 256, 2, 3),
}
# From this many rows on, gemm_rows.metal: rows of x in one threadgroup -> its outputs, channels of a span,
# outputs and rows of a simdgroup, spans loaded ahead, blocks that an SM is to hold. No spills by ptxas for 4
# bits (sm_90).
LEAST_GEMM = 33
GEMM_STRIPE = 4  # channels at least for each row, where few tiles of outputs leave the GPU idle
GEMM_ROWS = {
    64: (128, 32, 64, 32, 1, 3),
    128: (128, 32, 64, 32, 1, 2),
}
# Of the blocks that the multiprocessors can hold: each stripe more costs a write and a read of all sums.
FILLED = 0.5
MOST_BITS = 128  # of a lane's codes of one channel: 16 bytes
STEP = 16  # channels of one product of the matrix unit; stripes are whole steps
MULTIPROCESSORS = 132  # of an H200
MANY_STRIPE = 16  # channels at least for each row: a stripe writes and reads all sums of all rows


class RowsGeometry(NamedTuple):
    """One cut of sparse_rows.metal."""

    tokens: int  # rows of x in one threadgroup
    outputs: int  # of one lane
    lanes: int  # side by side on one channel
    rows: int  # channels in work at one time
    unroll: int
    list: int  # channels collected at one time
    slice: int
    decode: int
    stripe: int
    blocks: int = 0  # that an SM is to hold; 0 leaves it to the rule for all kernels

    @property
    def threads(self) -> int:
        return self.lanes * self.rows

    @property
    def tile(self) -> int:
        return self.lanes * self.outputs

    def tiles(self, band: int) -> int:
        return -(-band // self.tile)

    def stripes(self, inputs: int) -> int:
        return -(-inputs // self.stripe)


class MatrixGeometry(NamedTuple):
    """One cut of matrix_rows.metal."""

    tokens: int  # rows of x in one threadgroup
    outputs: int  # of one lane
    threads: int
    depth: int  # simdgroups with the same outputs
    span: int  # channels of x in threadgroup memory at one time
    unroll: int  # steps of 16 channels
    blocks: int  # that an SM is to hold
    stripe: int

    @property
    def tile(self) -> int:
        return self.threads // SIMD // self.depth * 8 * self.outputs

    def tiles(self, band: int) -> int:
        return -(-band // self.tile)

    def stripes(self, inputs: int) -> int:
        return -(-inputs // self.stripe)


class GemmGeometry(NamedTuple):
    """One cut of gemm_rows.metal."""

    tokens: int  # rows of x in one threadgroup
    tile: int  # outputs in one threadgroup
    span: int  # channels in threadgroup memory at one time
    simd_outputs: int  # of one simdgroup
    simd_tokens: int
    ahead: int  # 1 or 2: spans by which codes are loaded before they are unpacked
    blocks: int  # that an SM is to hold
    stripe: int

    @property
    def threads(self) -> int:
        return SIMD * (self.tile // self.simd_outputs) * (self.tokens // self.simd_tokens)

    @property
    def outputs(self) -> int:
        """Outputs of one channel that a lane unpacks."""
        return self.tile * self.span // self.threads

    def tiles(self, band: int) -> int:
        return -(-band // self.tile)

    def stripes(self, inputs: int) -> int:
        return -(-inputs // self.stripe)


class WholeGeometry(NamedTuple):
    """The cut of dequantize.metal."""

    outputs: int  # of one lane, a tile
    threads: int
    stripe: int  # channels of one lane

    @property
    def tile(self) -> int:
        return self.outputs

    def tiles(self, band: int) -> int:
        return band // self.outputs


WHOLE = WholeGeometry(8, 256, 4)


def choose_rows(
    kind: str, bands: Sequence[tuple[int, int]], inputs: int, rows: int, precise: bool = False
) -> RowsGeometry:
    """The cut of sparse_rows.metal for so many rows of x; the rest as `choose`."""
    family = "cuda" if kind == "cuda" else "metal"
    tokens = next((few for few in FEW_ROWS[family] if rows <= few), max(FEW_ROWS[family]))
    outputs, most_lanes, unroll, blocks = FEW_ROWS[family][tokens]
    lanes = _few_lanes([-(-band // outputs) for band, _ in bands], most_lanes)
    most_stripes = max(1, inputs // (LEAST_STRIPE * tokens))  # a stripe writes and reads the sums of all rows
    token_tiles = -(-rows // tokens)

    def tiles() -> int:
        return sum(-(-band // (lanes * outputs)) * number for band, number in bands) * token_tiles

    while lanes > SIMD and tiles() * most_stripes < THREADGROUPS[kind]:
        lanes //= 2
    threads = min(FEW_THREADS, LISTS * lanes)
    stripes = max(1, min(most_stripes, THREADGROUPS[kind] // tiles()))
    if tiles() * lanes * outputs * inputs <= LEAST_WEIGHTS:
        stripes = 1
    stripe = -(-inputs // stripes)
    listed = min(-(-stripe // (SIMD * LISTS)) * SIMD * LISTS, FEW_LISTED // max(tokens, 4))
    decode = 0 if precise else 2 if kind == "cuda" else 1
    return RowsGeometry(
        tokens=tokens,
        outputs=outputs,
        lanes=lanes,
        rows=threads // lanes,
        unroll=unroll,
        list=listed,
        slice=min(SLICE, outputs),
        decode=decode,
        stripe=stripe,
        blocks=blocks,
    )


def _few_lanes(units: Sequence[int], most: int) -> int:
    """The most lanes, a power of two, of which few idle; LISTS times 4, the least, are a simdgroup."""
    lanes = most
    while lanes > 4 and sum(-one % lanes for one in units) > IDLE * sum(
        -(-one // lanes) * lanes for one in units
    ):
        lanes //= 2
    return lanes


def choose_matrix(
    kind: str, bands: Sequence[tuple[int, int]], inputs: int, rows: int, bits: int
) -> MatrixGeometry | GemmGeometry:
    """The cut of matrix_rows.metal or gemm_rows.metal for so many rows of x and codes of so many bits."""
    some = MANY_ROWS if rows < LEAST_GEMM else GEMM_ROWS
    tokens = next((many for many in some if rows <= many), max(some))
    cut: MatrixGeometry | GemmGeometry
    if rows < LEAST_GEMM:
        cut, step, least = MatrixGeometry(tokens, *MANY_ROWS[tokens], inputs), STEP, MANY_STRIPE * tokens
        while cut.outputs * bits > MOST_BITS:
            cut = cut._replace(outputs=cut.outputs // 2)
    else:
        cut = GemmGeometry(tokens, *GEMM_ROWS[tokens], inputs)
        step, least = cut.span, GEMM_STRIPE * tokens
    tiles = sum(cut.tiles(band) * number for band, number in bands) * -(-rows // tokens)
    stripes = max(1, min(inputs // least, round(FILLED * MULTIPROCESSORS * cut.blocks / tiles)))
    return cut._replace(stripe=-(-inputs // (stripes * step)) * step)
