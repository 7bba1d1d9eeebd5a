"""The kernel benchmark: what is measured, what is read, where sparse stops paying; and memory lines."""

import mlx.core as mx
import numpy as np
import pytest
from typer.testing import CliRunner

from spqt_cli.backends import select, stock
from spqt_cli.bench import bench, kernel_timing, models, projections, shapes
from spqt_cli.bench.projections import Work
from spqt_cli.bench.results import KernelRow, Stat
from spqt_cli.cli.main import app
from spqt_cli.decode import profile
from spqt_cli.errors import ResourceError
from tests.conftest import tiny_config


@pytest.fixture(autouse=True)
def _small(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_timing, "SAMPLE_SECONDS", 1e-4)
    monkeypatch.setattr(projections, "ROTATE_BYTES", {"cpu": 1 << 16, "gpu": 1 << 16})


def work(outputs: tuple[int, ...] = (96,), inputs: int = 64, group_size: int = 32, **changes) -> Work:
    return Work("up_proj", outputs, inputs, 4, group_size, mx.float32, "key", **changes)


# --- what is measured


def test_units_their_single_projections_and_the_head():
    model = models.random_model(tiny_config("llama"), 4, 32, mx.float32)
    found = {one.name: one for one in projections.works(model, mx.float32)}
    assert found["q_proj+k_proj+v_proj"].outputs == (64, 32, 32)
    assert found["gate_proj+up_proj"].outputs == (160, 160)
    assert found["k_proj, v_proj"].outputs == (32,)
    assert found["o_proj, q_proj"].shape == "64x64"
    assert found["down_proj"].inputs == 160
    assert found["head"].is_head
    assert found["head"].outputs == (512,)
    assert len(found) == 7


@pytest.mark.parametrize("name", ["llama-3-8b", "qwen2.5-1.5b"])
def test_a_real_shape_is_never_computed_whole(name):
    """The model that only lends its shapes stays lazy, however large."""
    before = mx.get_active_memory()
    model = models.random_model(shapes.config(name, blocks=1), 4, 64, mx.bfloat16)
    works = projections.works(model, mx.float32)
    assert mx.get_active_memory() - before < 1 << 20
    assert len(works) == 7


def test_every_copy_has_memory_of_its_own():
    copies = projections.make_copies(work())
    layer = copies[0].layers[0]
    size = layer.weight.nbytes + layer.scales.nbytes + layer.biases.nbytes
    assert len(copies) * size >= 1 << 16 > (len(copies) - 1) * size
    data = [copy.layers[0].weight for copy in copies]
    assert all(mx.array_equal(one, data[0]) for one in data)
    assert len({id(one) for one in data}) == len(copies)
    pointers = {np.array(one, copy=False).ctypes.data for one in data}
    assert len(pointers) == len(copies)


def test_stock_is_row_grouped_with_the_same_weights():
    copy = projections.make_copies(work())[0]
    weight, scales, biases = copy.rows[0]
    assert weight.shape == (96, 64 * 4 // 32)
    back = mx.dequantize(weight, scales, biases, 32, 4)
    exact = copy.layers[0].dequantized().astype(mx.float32)
    step = mx.repeat(mx.abs(scales), 32, axis=1)  # half a step of rounding, half of snapping an edge
    assert bool((mx.abs(back - exact) <= step * 1.01 + 1e-6).all())


def test_inputs_in_no_whole_groups_are_a_plain_matrix_in_stock():
    rows, _, _ = kernel_timing.measure(work(inputs=80), [0.5], 2, 1e9)
    assert rows[0].weight_bytes == 96 * 80 * 4


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9])
def test_thresholds_skip_exactly_the_share(sparsity):
    x = mx.random.normal((1, 1, 1000), key=mx.random.key(1))
    threshold = kernel_timing.exact_threshold(x, sparsity)
    assert int((mx.abs(x) < threshold).sum().item()) == round(1000 * sparsity)


@pytest.mark.usefixtures("_no_backend")
def test_rows_of_a_unit_and_bytes_read():
    rows, crossing, link = kernel_timing.measure(work((96, 32)), [0.5], 3, 1e9)
    names = ["stock", "zigzag dense", "sparse 0%", "sparse 50%"]
    assert [row.variant for row in rows] == names
    assert all(len(row.time.samples) == 3 for row in rows)
    assert rows[0].speedup.samples == [1.0] * 3
    dense, half = rows[1], rows[3]
    assert half.weight_bytes == dense.weight_bytes / 2
    assert dense.line_bytes == dense.weight_bytes  # whole arrays, each a multiple of 128 bytes here
    assert half.weight_bytes < half.line_bytes <= dense.line_bytes
    assert half.bandwidth == pytest.approx(half.weight_bytes / half.time.median * 1e6)
    assert half.copy_share == pytest.approx(half.bandwidth / 1e9)
    assert 0 <= crossing.sparse_below <= 1
    assert link > 0


@pytest.mark.usefixtures("_no_backend")
def test_a_head_is_never_sparse():
    rows, crossing, _ = kernel_timing.measure(work(is_head=True), [0.5], 2, 1e9)
    assert [row.variant for row in rows] == ["stock", "zigzag dense"]
    assert crossing.sparse_below == 0


def test_each_call_waits_for_the_one_before():
    """The chain is one dependency after another: its value is x still, by way of every product."""
    copies = projections.make_copies(work(inputs=64))
    seen = []

    def call(x, copy):
        seen.append(x)
        return [x * 2]

    x = mx.arange(64.0).reshape(1, 1, 64)
    kernel_timing._chain(kernel_timing.Variant("it", None, call, copies), x, 4)
    assert len({id(one) for one in seen}) == 4
    assert all(mx.array_equal(one, x) for one in seen)


# --- where sparse stops paying


@pytest.fixture
def _no_backend(monkeypatch):
    """The variants that every backend has."""
    monkeypatch.setattr(select, "backend", lambda: stock.found("asked for"))


def rows_with(times: dict[str, list[float]]) -> list[KernelRow]:
    result = []
    for name, samples in times.items():
        sparsity = float(name.split()[1].rstrip("%")) / 100 if name.startswith("sparse") else None
        stat = Stat(samples)
        result.append(KernelRow("u", "s", name, sparsity, stat, stat, stat, 1, None, 1, 1))
    return result


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(0.25, 0.5), (0.5, 0.8), (1.0, 0.9)], 1.0),  # always
        ([(0.25, 1.1), (0.5, 1.2)], 0.0),  # never
        ([(0.25, 0.6), (0.5, 0.8), (1.0, 1.2)], 0.75),  # halfway from 0.5 to 1
        ([(0.25, 0.6), (0.5, 1.4), (0.75, 0.9)], 0.375),  # a later win does not count
        ([], 0.0),
    ],
)
def test_crossing(points, expected):
    assert kernel_timing.crossing(points) == pytest.approx(expected)


def test_crossover_is_against_the_faster_dense_way():
    times = {"stock": [10, 10], "zigzag dense": [20, 20], "sparse 0%": [21, 21], "sparse 50%": [8, 8]}
    found = kernel_timing.crossover(work(), rows_with(times))
    assert found.otherwise == profile.ROWS
    assert found.sparse_below == pytest.approx(0.5 + 0.5 * (10 - 8) / (21 - 8))


def test_row_grouped_must_win_by_more_than_noise():
    times = {"stock": [99, 99], "zigzag dense": [100, 100], "sparse 50%": [60, 60]}
    assert kernel_timing.crossover(work(), rows_with(times)).otherwise == profile.ZIGZAG
    head = kernel_timing.crossover(
        work(is_head=True), rows_with({"stock": [100, 100], "zigzag dense": [99, 99]})
    )
    assert head.otherwise == profile.ROWS


def test_row_grouped_means_our_own_kernel_where_there_is_one():
    times = {"stock": [90, 90], "row-grouped": [10, 10], "zigzag dense": [20, 20], "sparse 50%": [12, 12]}
    found = kernel_timing.crossover(work(), rows_with(times))
    assert (found.sparse_below, found.otherwise) == (0.0, profile.ROWS)


def test_drift_of_the_machine_does_not_move_the_crossover():
    times = {"stock": [30, 60], "zigzag dense": [20, 40], "sparse 0%": [30, 60], "sparse 50%": [10, 20]}
    assert kernel_timing.crossover(work(), rows_with(times)).sparse_below == pytest.approx(0.75)


def test_a_kernel_run_is_written_as_a_profile(monkeypatch):
    monkeypatch.setattr(shapes, "config", lambda name, blocks: tiny_config("llama"))
    report = bench.run_kernels(bench.Options(shape="smollm2-135m", group_size=32, repetitions=2))
    assert len(report.crossovers) == 7
    where = bench.write_profile(report)
    choices, fault = profile.read()
    assert fault == ""
    assert where == str(profile.path())
    model = models.random_model(tiny_config("llama"), 4, 32, mx.float32)
    assert {unit.key for unit in profile.units(model)} <= set(choices)


@pytest.mark.parametrize(("limit", "written"), [(1e9, True), (-1.0, False)])
def test_a_busy_machine_writes_no_profile(limit, written, monkeypatch):
    monkeypatch.setattr(shapes, "config", lambda name, blocks: tiny_config("llama"))
    monkeypatch.setattr(bench, "UNSTEADY", limit)
    arguments = [
        "bench",
        "--kernel",
        "--write",
        "--shape",
        "smollm2-135m",
        "--group-size",
        "32",
        "-r",
        "2",
        "-q",
    ]
    result = CliRunner().invoke(app, arguments)
    assert "sparse pays below density" in result.output  # the tables are printed either way
    assert profile.path().exists() is written
    assert isinstance(result.exception, ResourceError) is not written


def test_a_converted_model_lends_its_shapes(calibrated):
    report = bench.run_kernels(bench.Options(model=str(calibrated), repetitions=2))
    assert {one.unit for one in report.crossovers} >= {"q_proj+k_proj+v_proj", "down_proj", "head"}


# --- memory lines


def lines_by_hand(active, bands, chunks, line):
    """Every byte of every active chunk, put into its line."""
    total = 0
    for chunk in chunks:
        touched = set()
        for band in range(bands):
            for channel in np.flatnonzero(active):
                start = (band * active.size + channel) * chunk
                touched.update(byte // line for byte in range(start, start + chunk))
        total += len(touched) * line
    return total


@pytest.mark.parametrize("line", [64, 128])
@pytest.mark.parametrize("band", [32, 64, 256])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_lines_touched(band, density, line):
    active = np.random.default_rng(band).random(77) < density
    chunks = projections.chunk_bytes(4, 32, band, 2)
    assert projections.line_bytes(active, 3, chunks, line) == lines_by_hand(active, 3, chunks, line)


def test_chunks_of_a_channel():
    assert projections.chunk_bytes(bits=4, group_size=64, band=256, scale_bytes=2) == (128, 8, 8)
