"""sparse_gemv.metal, reduce_stripes.metal and count_active.metal under emulation.

Contract: outputs are matmul(mask(x, threshold), W) + bias for every width of code, group, dtype, cut and
hazard in the shapes; counts are exact; two runs are equal bit for bit; the emulator reports no fault.
The reference is float64. The bound is accuracy.py's: (n + 64) float32 roundings of the sum of the sizes of n
terms, plus the rounding to x's dtype; metal/README.md derives it. Other tolerances stand where they are used.
"""

import itertools

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.backends import accuracy, problems, stock
from spqt_cli.backends.gpu import backend as gpu
from spqt_cli.backends.gpu import first_use, geometry, many, plans, ways, weights
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.backends.problems import Case
from spqt_cli.format import layout
from tests.metal.emulator import emulate


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
    monkeypatch.setattr(first_use, "verdict", lambda *_, **__: "")
    monkeypatch.setattr(first_use, "rows_verdict", lambda *_, **__: "")
    monkeypatch.setattr(ways, "best", lambda *_: "quantized")  # of more rows; nothing is timed
    mx.disable_compile()  # a traced array has no bytes that an emulator could read
    yield launches
    mx.enable_compile()


def use(monkeypatch, cut):
    monkeypatch.setattr(geometry, "choose", lambda *_: cut)


def assert_right(case, actives=(0.5,)):
    """Outputs within the bound of float32 sums (metal/README.md), exact counts, equal when run again."""
    some = problems.matrices(case)
    for active in actives:
        x = problems.vector(case, active)
        found = accuracy.judge(x, some, gpu.sparse_gemv(x, some), gpu.sparse_gemv(x, some))
        assert found.passed, (active, found.words())


def kinds(launches):
    return [one.kernel.name.split("_")[1] for one in launches]


CUTS = {
    "wide": geometry.Geometry(32, 32, 4, 2, 128, 8, 0, 100),
    "narrow": geometry.Geometry(32, 4, 32, 2, 256, 4, 0, 1000),
    "narrowest": geometry.Geometry(32, 1, 64, 1, 128, 1, 0, 150),
    "ragged": geometry.Geometry(32, 9, 11, 3, 128, 8, 0, 130),
    "eight lanes": geometry.Geometry(32, 8, 16, 2, 128, 4, 0, 100),
    "clipped": geometry.Geometry(32, 16, 12, 3, 192, 8, 0, 100, padded=0),
    "wider": geometry.Geometry(64, 16, 8, 2, 256, 8, 0, 1000),
    "across simdgroups": geometry.Geometry(64, 40, 3, 1, 128, 16, 0, 90),
}


DTYPES = (mx.float16, mx.bfloat16, mx.float32)


@pytest.mark.parametrize("decode", [0, 1, 2, 3])
@pytest.mark.parametrize("bits", layout.BITS)
def test_every_width_of_code(emulated, monkeypatch, bits, decode):
    use(monkeypatch, CUTS["wide"]._replace(decode=decode))
    assert_right(Case((1000,), 333, bits))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_float32_rounds_less_with_codes_around_their_middle(emulated, monkeypatch, bits):
    (matrix,) = problems.matrices(Case((1000,), 777, bits, dtype=mx.float32))
    x = problems.vector(Case((1000,), 777, dtype=mx.float32), 1.0)
    exact = accuracy.reference(matrix)[0] @ accuracy.wide(x).ravel()
    decodes = [geometry.choose("g", [(1000, 1)], 777, precise).decode for precise in (True, False)]
    errors = []
    for decode in decodes:
        use(monkeypatch, CUTS["wide"]._replace(decode=decode))
        (y,), _ = gpu.sparse_gemv(x, [matrix])
        weights.kept(matrix).forget()
        errors.append(np.sqrt(np.mean((accuracy.wide(y).ravel() - exact) ** 2)))
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("cut", CUTS)
def test_every_cut(emulated, monkeypatch, cut):
    use(monkeypatch, CUTS[cut])
    assert_right(Case((1100,), 257, bits=3, bias=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cut", CUTS)
def test_x_is_normalized_on_the_way_in(emulated, cut, dtype):
    case = Case((320, 64), 301, dtype=dtype, per_channel=True)
    some = problems.matrices(case)
    x, norm, normed = problems.before_norm(case)
    assert mx.allclose(mx.fast.rms_norm(x, norm.weight, norm.eps), normed, rtol=1e-6).item()
    plan = launching.make_plan(x.shape, dtype, some, CUTS[cut], launching.Form(norm=norm))
    found = [launching.launch(x, plan, plan.nothing) for _ in range(2)]
    assert accuracy.judge(normed, some, *found).passed
    assert not accuracy.judge(x, some, *found).passed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", layout.GROUP_SIZES)
@pytest.mark.parametrize("bits", layout.BITS)
def test_full_matrix(emulated, monkeypatch, bits, group, dtype):
    """Bits, group and dtype by shape (one launch; stripes; a band not full) and density."""
    use(monkeypatch, CUTS["eight lanes"])
    for outputs, inputs in ((256, 64), (1030, 130), (95, 257)):
        assert_right(Case((outputs,), inputs, bits, group, dtype), actives=(0, 1, 0.25, 0.5, 0.75, 1.0))


@pytest.mark.parametrize("cut", ["wide", "narrow"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_any_number_of_active_channels(emulated, monkeypatch, bits, cut):
    use(monkeypatch, CUTS[cut])
    assert_right(Case((576,), 301, bits), actives=(0, 1, 2, 0.25, 0.5, 0.75, 300, 1.0))


@pytest.mark.parametrize(
    ("outputs", "inputs"), [(4095, 60), (1, 70), (64, 1), (2752, 64), (11008, 40), (100, 11008), (65, 4095)]
)
@pytest.mark.parametrize("kind", ["cuda", "g", "d"])
def test_ragged_shapes_with_the_rule_of_a_device(emulated, monkeypatch, kind, outputs, inputs):
    monkeypatch.setattr(plans, "device_class", lambda: kind)
    assert_right(Case((outputs,), inputs))


@pytest.mark.parametrize("cut", ["wide", "narrow"])
def test_shared_launch_with_unequal_bands_and_thresholds(emulated, monkeypatch, cut):
    use(monkeypatch, CUTS[cut])
    case = Case((1024, 192, 300), 260, bias=True)
    some = problems.matrices(case)
    some[1].set_threshold(0.5)
    some[2].set_threshold(2.0)
    del some[1]["bias"]
    x = problems.vector(case)
    ys, active = gpu.sparse_gemv(x, some)
    assert accuracy.judge(x, some, (ys, active), (ys, active)).passed
    assert kinds(emulated) == (["gemv"] if cut == "narrow" else ["gemv", "reduce", "count"])
    assert len(set(np.array(active).tolist())) == 3


def test_thresholds_per_channel(emulated, monkeypatch):
    use(monkeypatch, CUTS["wide"])
    assert_right(Case((500, 128), 260, per_channel=True))


def test_unlike_projections_take_launches_of_their_own(emulated, monkeypatch):
    use(monkeypatch, CUTS["narrow"])
    some = [*problems.matrices(Case((128,), 96, bits=4)), *problems.matrices(Case((128,), 96, bits=8))]
    x = problems.vector(Case((128,), 96))
    ys, active = gpu.sparse_gemv(x, some)
    assert accuracy.judge(x, some, (ys, active), (ys, active)).passed
    assert active.shape == (2,)
    assert len(emulated) == 2


@pytest.mark.parametrize("cut", ["narrow", "wide"])  # one launch, and stripes
def test_counts_are_added_up_by_the_kernels(emulated, monkeypatch, cut):
    use(monkeypatch, CUTS[cut])
    some = problems.matrices(Case((128, 96), 301))
    step = gpu.prepare(some)
    x = problems.vector(Case((128, 96), 301))
    ys, once = step(x, mx.zeros(2, mx.uint32))
    _, twice = step(x, once)
    assert accuracy.judge(x, some, (ys, once), (ys, once)).passed
    assert np.array_equal(np.array(twice), 2 * np.array(once))


def test_counts_that_nobody_reads_keep_no_sums(emulated, monkeypatch):
    use(monkeypatch, CUTS["wide"])
    case = Case((4096,), 301)
    some = problems.matrices(case)
    x = problems.vector(case)
    counts = mx.zeros(1, mx.uint32)
    monkeypatch.setattr(
        launching, "run", lambda launch, _: [mx.random.normal(shape) for shape in launch.shapes]
    )
    step = gpu.prepare(some)
    (y,), counts = step(x, counts)
    mx.eval(y)
    before = mx.get_active_memory()
    mx.eval(counts)
    assert mx.get_active_memory() == before  # it was there already


def test_layers_without_thresholds_share_a_launch_densely(emulated, monkeypatch):
    use(monkeypatch, CUTS["wide"])
    some = problems.matrices(Case((128, 96), 301))
    x = problems.vector(Case((128, 96), 301))
    some[1].set_threshold(None)
    (first, second), active = gpu.prepare(some)(x, mx.zeros(2, mx.uint32))
    assert kinds(emulated) == ["gemv", "reduce", "count"]
    assert active[1].item() == 301
    some[1].set_threshold(0.0)
    assert accuracy.judge(x, some, ([first, second], active), ([first, second], active)).passed


def test_nan_is_active_and_minus_zero_is_not(emulated, monkeypatch):
    use(monkeypatch, CUTS["wide"])
    (matrix,) = problems.matrices(Case((64,), 200))
    x = mx.zeros((1, 1, 200), dtype=mx.float16)
    assert gpu.sparse_gemv(-x, [matrix])[1].item() == 0
    x[..., 150] = float("nan")
    (y,), active = gpu.sparse_gemv(x, [matrix])
    assert active.item() == 1
    assert mx.isnan(y).all().item()


def test_one_dense_row_ignores_thresholds(emulated, monkeypatch):
    use(monkeypatch, CUTS["wide"])
    case = Case((500,), 300, dtype=mx.float32)
    (matrix,) = problems.matrices(case)
    x = problems.vector(case)
    y = gpu.matmul(x, matrix)
    matrix.set_threshold(0.0)
    assert accuracy.judge(x, [matrix], ([y], mx.array([300])), ([y], mx.array([300]))).passed


def test_a_layer_without_threshold_runs_dense(emulated, monkeypatch):
    use(monkeypatch, CUTS["wide"])
    (matrix,) = problems.matrices(Case((128,), 96))
    matrix.set_threshold(None)
    x = problems.vector(Case((128,), 96))
    assert mx.allclose(gpu.matmul(x, matrix), stock.matmul(x, matrix), atol=1e-2).item()


@pytest.mark.parametrize("outputs", [250, 256])
def test_a_matrix_is_dequantized_as_mlx_multiplies_it(monkeypatch, outputs):
    """Where our own kernel can't: test_dequantize.py has that."""
    monkeypatch.setattr(ways, "best", lambda *_: "dequantized")
    monkeypatch.setattr(plans, "of_matrix", lambda *_: None)
    (matrix,) = problems.matrices(Case((outputs,), 96, dtype=mx.float32, band=64, bias=True))
    x = mx.random.normal((2, 20, 96), key=mx.random.key(1))
    # Two float32 sums of 96 terms below 1 in size: 96 * 2^-24 * 96 < 1e-3.
    assert mx.allclose(gpu.matmul(x, matrix), stock.matmul(x, matrix), atol=1e-3).item()


def test_dequantized_matrices_do_not_pile_up(monkeypatch):
    """MLX keeps temporaries for a hundred operations; a prompt dequantizes every matrix of the model."""
    monkeypatch.setattr(ways, "best", lambda *_: "dequantized")
    (matrix,) = problems.matrices(Case((128,), 96, dtype=mx.float32))
    monkeypatch.setattr(plans, "of_matrix", lambda *_: None)
    monkeypatch.setattr(many, "MOST_UNFREED", 3 * 128 * 96 * 4)
    many._unfreed.clear()
    evaluated = []
    original = mx.eval
    monkeypatch.setattr(mx, "eval", lambda *arrays: evaluated.extend(arrays) or original(*arrays))
    x = mx.random.normal((1, 20, 96), key=mx.random.key(1))
    for _ in range(8):
        y = gpu.matmul(x, matrix)
    assert len(evaluated) == 2
    traced = mx.compile(lambda x: [gpu.matmul(x, matrix) for _ in range(4)][-1])(x)
    assert mx.allclose(traced, y).item()


def test_a_new_threshold_is_not_missed_by_the_plan(emulated, monkeypatch):
    use(monkeypatch, CUTS["narrow"])
    (matrix,) = problems.matrices(Case((128,), 96))
    x = problems.vector(Case((128,), 96))
    assert gpu.sparse_gemv(x, [matrix])[1].item() == 48
    matrix.set_threshold(99.0)
    assert gpu.sparse_gemv(x, [matrix])[1].item() == 0


@pytest.mark.parametrize(
    ("kind", "tile"), [(kind, tile) for kind in geometry.THREADGROUPS for tile in geometry.tiles_of(kind)]
)
@pytest.mark.parametrize("outputs", [1, 64, 576, 1024, 2752 * 4, 4288, 14336, 27392, 32064, 151936])
def test_rule_keeps_within_what_devices_offer(kind, tile, outputs):
    for inputs, group in itertools.product((1, 64, 4095, 28672), layout.GROUP_SIZES):
        band = layout.band_of(outputs, group)
        cut = geometry.choose(kind, [(band, -(-outputs // band))], inputs, tile=tile)
        assert cut.threads <= 384  # runs at any register count of an Apple GPU
        assert cut.list % cut.threads == 0
        assert cut.list // cut.threads <= 32
        summands = cut.threads // 32 if cut.lanes < 32 and 32 % cut.lanes == 0 else cut.rows
        columns = 32 if cut.lanes < 32 and 32 % cut.lanes == 0 else cut.lanes
        held = cut.outputs * cut.lanes // 32 if columns == 32 and cut.lanes < 32 else cut.outputs
        listed = cut.list + cut.padded * cut.rows * cut.unroll
        memory = 8 * listed + 4 * summands * columns * min(cut.slice, held) + cut.threads // 8
        assert memory <= 32768  # bytes of threadgroup memory
        assert cut.stripes(inputs) * cut.stripe >= inputs
        assert cut.tiles(band) * cut.tile >= band
