"""Which tiles the product of one row takes: timed within five seconds on Metal, remembered, and told.

Contract: another tile is taken only where it gains; compiling takes nothing of the time; when time is over
each tile was timed all the same; a choice is made once per machine and kind of layer; a damaged file is as
none; a tile whose kernel does not run loses; on CUDA, and without a GPU, nothing is timed; both are right.
"""

import json

import mlx.core as mx
import pytest

from spqt_cli.backends import accuracy, problems
from spqt_cli.backends.gpu import backend as gpu
from spqt_cli.backends.gpu import first_use, geometry, plans, tiles, ways
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.backends.gpu.ways import Kind
from spqt_cli.backends.problems import Case
from tests.backends.gpu.test_kernels import emulated

__all__ = ["emulated"]  # a fixture
KIND = Kind(mx.float16, 4, 64)


@pytest.fixture
def mac(monkeypatch, tmp_path):
    """A Mac with a clock of its own; returns (seconds of a product by tile, the tiles of all products)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(tiles, "SHAPES", ((64, 32), (32, 64)))
    monkeypatch.setattr(tiles, "_chosen", {})
    for cached in (first_use.machine, ways.here, tiles.known):
        cached.cache_clear()
    clock, seconds, made = [0.0], {"wide": 0.001, "narrow": 0.001}, []
    monkeypatch.setattr(tiles.time, "perf_counter", lambda: clock[0])

    def make(x, layer, name):
        compiled = []

        def product(row):
            if not compiled:
                clock[0] += 2.0
                compiled.append(True)
            clock[0] += seconds[name]
            made.append(name)
            return row

        return product

    yield make, seconds, made
    for cached in (first_use.machine, ways.here, tiles.known):
        cached.cache_clear()


@pytest.mark.parametrize(("narrow", "expected"), [(0.0005, "narrow"), (0.00098, "wide"), (0.002, "wide")])
def test_another_tile_is_taken_where_it_gains(mac, narrow, expected, capsys):
    make, seconds, _ = mac
    seconds["narrow"] = narrow
    assert tiles.best("s", KIND, make) == expected
    assert "timing tiles" in capsys.readouterr().err
    (line,) = tiles.report()
    assert line.startswith(f"float16, 4 bits, groups of 64: {expected} tiles, ")


def test_compiling_takes_nothing_of_the_time(mac):
    make, _, made = mac
    choice = tiles.measured(KIND, ("wide", "narrow"), make)
    assert choice.us == {"wide": 2000.0, "narrow": 2000.0}  # two shapes of a millisecond each
    assert choice.seconds < 1.0
    assert made.count("wide") == made.count("narrow") == 2 * tiles.CALLS * (1 + tiles.REPEATS)


def test_no_timing_begins_when_time_is_over(mac):
    make, seconds, made = mac
    seconds.update(wide=1.0, narrow=0.5)
    choice = tiles.measured(KIND, ("wide", "narrow"), make)
    assert choice.tile == "narrow"
    assert {made.count(name) for name in ("wide", "narrow")} == {2 * tiles.CALLS * 2}


def test_a_choice_is_made_once_for_a_machine_and_kind(mac):
    make, _, made = mac
    tiles.best("s", KIND, make)
    timed = len(made)
    tiles._chosen.clear()
    tiles.known.cache_clear()  # as a new process would
    tiles.best("s", KIND, make)
    assert len(made) == timed
    tiles.best("s", KIND._replace(bits=8), make)
    assert len(made) == 2 * timed
    assert len(tiles.report()) == 2


@pytest.mark.parametrize("text", ["", "[]", '{"a": 3}', '{"a": {"tile": "none", "us": {}, "seconds": 1}}'])
def test_a_damaged_file_is_timed_again(mac, text):
    make, _, made = mac
    tiles._file().parent.mkdir(parents=True, exist_ok=True)
    tiles._file().write_text(text)
    assert tiles.best("s", KIND, make) == "wide"
    assert made
    assert len(json.loads(tiles._file().read_text())) == 1


@pytest.mark.parametrize(("refused", "expected"), [(["wide"], "narrow"), (["wide", "narrow"], "wide")])
def test_a_tile_whose_kernel_does_not_run_loses(mac, refused, expected):
    make, _, _ = mac

    def refusing(x, layer, name):
        if name in refused:
            raise RuntimeError("unable to load kernel")
        return make(x, layer, name)

    assert tiles.best("s", KIND, refusing) == expected


def test_nothing_is_timed_on_cuda_or_without_a_gpu(mac, monkeypatch):
    make, _, made = mac
    assert tiles.best("cuda", KIND, make) == "narrow"
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert tiles.best("s", KIND, make) == "wide"
    assert made == []


@pytest.mark.parametrize("tile", geometry.TILES)
def test_products_are_right_in_either_tile(emulated, monkeypatch, tile):
    monkeypatch.setattr(plans, "device_class", lambda: "g")
    monkeypatch.setattr(tiles, "best", lambda *_: tile)
    case = Case((4096,), 96)
    some, x = problems.matrices(case), problems.vector(case)
    assert plans.choose(some, x.dtype).lanes == {"wide": 128, "narrow": 32}[tile]
    found = accuracy.judge(x, some, gpu.sparse_gemv(x, some), gpu.sparse_gemv(x, some))
    assert found.passed, found.words()


def test_what_is_timed_is_the_sparse_product(emulated, monkeypatch):
    monkeypatch.setattr(plans, "device_class", lambda: "g")
    layer = ways.filled(KIND, (256, 64), 0)
    layer.set_threshold(tiles.HALF)
    x = mx.random.normal((1, 1, 64), key=mx.random.key(1)).astype(mx.float16)
    y = plans._product_by(x, layer, "narrow")(x)
    expected = launching.launch(x, plans.of_row(x, [layer], launching.Form()))[0][0]
    assert mx.allclose(y, expected).item()
    assert 20 < gpu.sparse_gemv(x, [layer])[1].item() < 44
