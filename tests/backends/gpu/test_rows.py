"""sparse_rows.metal, matrix_rows.metal and reduce_rows.metal under emulation.

Contract: each row of x gives matmul(mask(row, threshold), W) + bias, whatever rows stand beside it, for every
width of code, group, dtype and number of rows; counts are exact for each row; two runs are equal bit for bit;
the emulator reports no fault. Reference and bound are accuracy.py's, as in test_kernels.py; the matrix unit's
weights are rounded to x's dtype, which the bound allows for (`rounded`).
"""

import itertools

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.backends import accuracy, problems, stock
from spqt_cli.backends.gpu import backend as gpu
from spqt_cli.backends.gpu import first_use, geometry, plans, rows, ways
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.backends.gpu.geometry import MatrixGeometry, RowsGeometry
from spqt_cli.backends.problems import Case
from spqt_cli.format import layout
from tests.metal.emulator import emulate

DTYPES = (mx.float16, mx.bfloat16, mx.float32)
CUTS = {
    "two": RowsGeometry(2, 16, 16, 8, 4, 256, 8, 0, 170),
    "four": RowsGeometry(4, 16, 8, 8, 2, 256, 8, 0, 400),
    "eight": RowsGeometry(8, 8, 16, 8, 2, 256, 8, 0, 170),
    "narrowest": RowsGeometry(8, 8, 4, 8, 3, 512, 4, 0, 400),
    "wide": RowsGeometry(4, 16, 64, 4, 2, 256, 8, 0, 170),
    "widest": RowsGeometry(2, 32, 256, 1, 2, 256, 8, 0, 170),
}
MATRIX_CUTS = {
    "sixteen": MatrixGeometry(16, 8, 128, 1, 64, 2, 4, 150),
    "thirty-two": MatrixGeometry(32, 16, 64, 2, 128, 1, 2, 400),
    "eight": MatrixGeometry(8, 32, 128, 4, 256, 1, 2, 400),
    "sixty-four": MatrixGeometry(64, 8, 32, 1, 64, 4, 2, 400),
}


@pytest.fixture
def emulated(monkeypatch):
    """Every launch goes through the emulator; a fault it sees fails the test. Returns the launches."""
    launches = []

    def run(launch, inputs):
        emulation = emulate(launch, inputs)
        assert emulation.reports == []
        launches.append(launch)
        return emulation.outputs

    monkeypatch.setattr(launching, "run", run)
    monkeypatch.setattr(first_use, "rows_verdict", lambda *_, **__: "")
    monkeypatch.setattr(ways, "best", lambda *_: "few")
    return launches


def assert_right(case, cut, counts):
    """Outputs of each row within the bound, its count exact, all equal when run again."""
    some = problems.matrices(case)
    plan = rows.make_plan(case.dtype, some, cut, dense=False)
    rounded = isinstance(cut, MatrixGeometry)
    for count in counts:
        x = problems.rows(case, count)
        found = accuracy.judge_rows(x, some, rows.launch(x, plan), rows.launch(x, plan), rounded=rounded)
        assert found.passed, (count, found.words())


FORMATS = list(itertools.product(layout.BITS, layout.GROUP_SIZES, DTYPES))


@pytest.mark.parametrize(("number", "kind"), list(enumerate(FORMATS)), ids=str)
def test_full_matrix(emulated, number, kind):
    """Bits, group and dtype; cuts, decoders and numbers of rows take turns."""
    cut = (CUTS["two"], CUTS["four"], CUTS["eight"], CUTS["narrowest"])[number % 4]
    cut = cut._replace(decode=number // 4 % 3)
    bits, group, dtype = kind
    assert_right(Case((260,), 203, bits, group, dtype), cut, (cut.tokens + 1,))


@pytest.mark.parametrize("tokens", [2, 4, 8])
@pytest.mark.parametrize("bits", layout.BITS)
def test_every_width_of_code_in_every_number_of_rows(emulated, bits, tokens):
    cut = CUTS["eight"]._replace(tokens=tokens, decode=bits % 3)
    assert_right(Case((260,), 203, bits, bias=True), cut, (tokens,))


@pytest.mark.parametrize("cut", CUTS)
def test_every_cut(emulated, cut):
    assert_right(Case((1100,), 257, bits=3, bias=True), CUTS[cut], (3,))


@pytest.mark.parametrize("kind", ["cuda", "g"])
def test_any_number_of_rows_with_the_rule_of_a_device(emulated, monkeypatch, kind):
    monkeypatch.setattr(plans, "device_class", lambda: kind)
    case = Case((700,), 301)
    some = problems.matrices(case)
    for count in (*range(1, 18), 64):
        x = problems.rows(case, count)
        found = gpu.sparse_rows(x, some)
        assert found[1].shape == (1, count)
        assert accuracy.judge_rows(x, some, found, found).passed


@pytest.mark.parametrize(
    ("outputs", "inputs"), [(4095, 60), (1, 70), (64, 1), (2752, 64), (11008, 40), (100, 3000)]
)
@pytest.mark.parametrize("kind", ["cuda", "d"])
def test_ragged_shapes_with_the_rule_of_a_device(emulated, monkeypatch, kind, outputs, inputs):
    monkeypatch.setattr(plans, "device_class", lambda: kind)
    case = Case((outputs,), inputs)
    some = problems.matrices(case)
    x = problems.rows(case, 3)
    found = gpu.sparse_rows(x, some)
    rounded = launching.tiny(some)  # MLX's own matmul runs
    assert accuracy.judge_rows(x, some, found, found, rounded=rounded).passed


@pytest.mark.parametrize("stripe", [1000, 100])
def test_shared_launch_with_unequal_bands_and_thresholds(emulated, monkeypatch, stripe):
    monkeypatch.setattr(geometry, "choose_rows", lambda *_: CUTS["eight"]._replace(stripe=stripe))
    case = Case((1024, 192, 300), 260, bias=True)
    some = problems.matrices(case)
    some[1].set_threshold(None)
    some[2].set_threshold(2.0)
    del some[1]["bias"]
    x = problems.rows(case, 5)
    found = gpu.sparse_rows(x.reshape(5, 1, 260), some)
    assert found[0][1].shape == (5, 1, 192)
    assert found[1][1].tolist() == [260] * 5
    some[1].set_threshold(0.0)
    ys = [y.reshape(1, 5, -1) for y in found[0]]
    assert accuracy.judge_rows(x, some, (ys, found[1]), (ys, found[1])).passed
    assert len(emulated) == (1 if stripe == 1000 else 2)


def test_thresholds_per_channel(emulated):
    assert_right(Case((500, 128), 260, per_channel=True), CUTS["four"], (4,))


def test_projections_of_other_kinds_take_launches_of_their_own(emulated):
    some = [*problems.matrices(Case((128,), 96, bits=4)), *problems.matrices(Case((128,), 96, bits=8))]
    x = problems.rows(Case((128,), 96), 3)
    found = gpu.sparse_rows(x, some)
    assert accuracy.judge_rows(x, some, found, found).passed
    assert found[1].shape == (2, 3)


def bits_of(array):
    return np.array(array.view(mx.uint16))


@pytest.mark.parametrize("cut", ["four", "wide", "eight"])
def test_a_row_is_the_same_bits_beside_any_others(emulated, cut):
    case = Case((700,), 301)
    some = problems.matrices(case)
    plan = rows.make_plan(case.dtype, some, CUTS[cut], dense=False)
    x = problems.rows(case, 4)
    row = x[:, 1:2]
    others = [
        x,
        mx.concatenate([mx.zeros_like(row), row], axis=1),
        mx.concatenate([9.0 * x[:, 2:], row], axis=1),
    ]
    found = [rows.launch(beside, plan)[0][0] for beside in others]
    own = [bits_of(y[0, place]) for y, place in zip(found, (1, 1, 2), strict=True)]
    assert np.array_equal(own[0], own[1])
    assert np.array_equal(own[0], own[2])


def test_nan_is_active_in_its_own_row_alone(emulated):
    (matrix,) = problems.matrices(Case((64,), 200))
    x = mx.zeros((1, 3, 200), dtype=mx.float16)
    x[:, 1, 150] = float("nan")
    (y,), active = gpu.sparse_rows(x, [matrix])
    assert active.tolist() == [[0, 1, 0]]
    assert mx.isnan(y[0, 1]).all().item()
    assert (y[0, ::2] == 0).all().item()


def test_dense_rows_ignore_thresholds(emulated):
    case = Case((300,), 300, dtype=mx.float32)
    (matrix,) = problems.matrices(case)
    x = problems.rows(case, 3)
    y = gpu.matmul(x, matrix)
    matrix.set_threshold(0.0)
    counts = mx.full((1, 3), 300, mx.uint32)
    assert accuracy.judge_rows(x, [matrix], ([y], counts), ([y], counts)).passed


def test_a_new_threshold_is_not_missed_by_the_plan(emulated):
    (matrix,) = problems.matrices(Case((128,), 96))
    x = problems.rows(Case((128,), 96), 3)
    before = gpu.sparse_rows(x, [matrix])[1]
    matrix.set_threshold(99.0)
    assert gpu.sparse_rows(x, [matrix])[1].tolist() == [[0, 0, 0]] != before.tolist()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("bits", layout.BITS)
def test_matrix_unit_with_every_width_of_code(emulated, bits, dtype):
    cut = MATRIX_CUTS["sixteen"]._replace(threads=64)
    assert_right(Case((300,), 203, bits, dtype=dtype, bias=True), cut, (17,))


@pytest.mark.parametrize("cut", MATRIX_CUTS)
@pytest.mark.parametrize("group", layout.GROUP_SIZES)
def test_matrix_unit_with_every_group_and_cut(emulated, group, cut):
    assert_right(Case((300,), 203, 4, group, per_channel=True), MATRIX_CUTS[cut], (70,))


def test_matrix_unit_with_scales_of_another_dtype(emulated):
    case = Case((95,), 140, 4, 32, mx.bfloat16, scales=mx.float32)
    assert_right(case, MATRIX_CUTS["sixteen"], (11,))


@pytest.mark.parametrize("way", ["few", "matrix", "dequantized", "quantized"])
def test_every_way_skips_alike(emulated, monkeypatch, way):
    monkeypatch.setattr(ways, "best", lambda *_: way)
    monkeypatch.setattr(plans, "device_class", lambda: "cuda")
    case = Case((256, 100), 130, bias=True)
    some = problems.matrices(case)
    x = problems.rows(case, 12)
    ys, active = gpu.sparse_rows(x, some)
    expected, counts = stock.sparse_rows(x, some)
    assert np.array_equal(np.array(active), np.array(counts))
    for y, other in zip(ys, expected, strict=True):
        # The sums of 100 terms below 3 in size, weights and results rounded to float16: 2^-11 * 3 * 100.
        assert mx.allclose(y, other, atol=0.15).item()


def test_other_ways_of_dense_rows_are_right(emulated, monkeypatch):
    monkeypatch.setattr(plans, "device_class", lambda: "cuda")
    case = Case((256,), 130)
    (matrix,) = problems.matrices(case)
    x = problems.rows(case, 12)
    matrix.set_threshold(0.0)
    counts = mx.full((1, 12), 130, mx.uint32)
    for way in ("few", "matrix", "dequantized"):
        monkeypatch.setattr(ways, "best", lambda *_, way=way: way)
        y = gpu.matmul(x, matrix)
        assert accuracy.judge_rows(x, [matrix], ([y], counts), ([y], counts), rounded=True).passed


@pytest.mark.parametrize("kind", geometry.THREADGROUPS)
@pytest.mark.parametrize("outputs", [1, 64, 576, 1024, 2752 * 4, 4288, 14336, 27392, 32064, 151936])
def test_rule_keeps_within_what_devices_offer(kind, outputs):
    for inputs, group, count in itertools.product((1, 64, 4095, 28672), layout.GROUP_SIZES, (2, 3, 8, 64)):
        band = layout.band_of(outputs, group)
        bands = [(band, -(-outputs // band))]
        cut = geometry.choose_rows(kind, bands, inputs, count)
        assert cut.threads <= 384  # runs at any register count of an Apple GPU
        assert cut.threads % 32 == 0
        assert cut.list % (32 * geometry.LISTS) == 0
        assert geometry.LISTS % cut.rows == 0
        assert cut.lanes & (cut.lanes - 1) == 0
        summands = cut.threads // 32 if cut.lanes < 32 else cut.rows
        values = 4 * cut.tokens * (cut.list + 1)
        memory = 2 * cut.list + values + 32 + cut.tokens * cut.threads // 8
        memory += 4 * summands * min(cut.slice, cut.outputs) * (cut.lanes + 4)
        assert memory <= 32768  # bytes of threadgroup memory
        assert cut.stripes(inputs) * cut.stripe >= inputs
        assert cut.tiles(band) * cut.tile >= band
        many = geometry.choose_matrix(kind, bands, inputs, min(count, 32), 4)
        assert isinstance(many, MatrixGeometry)
        assert many.span % (16 * many.unroll * many.depth) == 0
        assert many.stripe % geometry.STEP == 0
        simdgroups = many.threads // 32
        assert simdgroups % many.depth == 0
        added = 4 * 16 * (simdgroups - simdgroups // many.depth) * 32  # four sums of four floats
        fours = many.tokens * many.span // 4
        assert fours % (many.threads * max(1, min(8, fours // many.threads))) == 0  # lanes fill x evenly
        memory = 8 * many.tokens * (many.span // 4 + 4) + added
        assert memory * many.blocks <= 227 << 10  # of an SM
        assert memory <= 48 << 10  # of a threadgroup, without asking CUDA for more
        assert many.stripes(inputs) * many.stripe >= inputs
        assert many.tiles(band) * many.tile >= band


def test_plans_keep_launches_of_few_shapes(monkeypatch):
    some = problems.matrices(Case((64,), 40))
    plan = rows.make_plan(mx.float16, some, CUTS["two"], dense=False)
    monkeypatch.setattr(launching, "run", lambda launch, _: [mx.zeros(shape) for shape in launch.shapes])
    for count in range(2, 3 * rows.MOST_SHAPES):
        rows.launch(mx.zeros((1, count, 40), mx.float16), plan)
    assert len(plan.launches) <= rows.MOST_SHAPES
