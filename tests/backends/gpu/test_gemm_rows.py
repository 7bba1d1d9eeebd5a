"""gemm_rows.metal under emulation.

Contract: as test_rows.py has it for matrix_rows.metal: each row of x gives matmul(mask(row, threshold), W) +
bias within the bound for weights rounded to x's dtype, counts are exact, two runs are equal bit for bit, and
the emulator reports no fault.
"""

import itertools

import mlx.core as mx
import pytest

from spqt_cli.backends import accuracy, problems
from spqt_cli.backends.gpu import geometry, rows
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.backends.gpu.geometry import GemmGeometry
from spqt_cli.backends.problems import Case
from spqt_cli.format import layout
from tests.metal.emulator import emulate

CUTS = {
    "narrow": GemmGeometry(64, 128, 32, 64, 32, 2, 3, 160),
    "low": GemmGeometry(32, 128, 32, 32, 32, 2, 4, 1000),
    "tall": GemmGeometry(128, 128, 32, 32, 64, 1, 2, 1000),
    "wide": GemmGeometry(64, 256, 32, 64, 32, 2, 1, 128),
    "deep": GemmGeometry(64, 128, 64, 64, 16, 1, 1, 1000),
}


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """Every launch goes through the emulator; a fault it sees fails the test. Returns what is launched."""
    launches = []

    def run(launch, inputs):
        emulation = emulate(launch, inputs)
        assert emulation.reports == []
        launches.append(launch)
        return emulation.outputs

    monkeypatch.setattr(launching, "run", run)
    return launches


def assert_right(case, cut, count):
    """Outputs of each row within the bound, its count exact, all equal when run again."""
    some = problems.matrices(case)
    plan = rows.make_plan(case.dtype, some, cut, dense=False)
    x = problems.rows(case, count)
    found = accuracy.judge_rows(x, some, rows.launch(x, plan), rows.launch(x, plan), rounded=True)
    assert found.passed, found.words()


KINDS = list(itertools.product(layout.BITS, (mx.float16, mx.bfloat16)))


@pytest.mark.parametrize(("number", "kind"), list(enumerate(KINDS)), ids=str)
def test_every_width_of_code(number, kind):
    """Groups and cuts take turns."""
    bits, dtype = kind
    group = layout.GROUP_SIZES[number % len(layout.GROUP_SIZES)]
    cut = CUTS["narrow" if number % 4 < 2 else "tall"]
    assert_right(Case((160,), 200, bits, group, dtype, bias=True), cut, 33)


@pytest.mark.parametrize(("cut", "group"), list(zip(CUTS, (128, 64, 32, 64, 32), strict=True)))
@pytest.mark.parametrize("inputs", [203, 264])  # channels that no unit of 16 bytes divides, and others
def test_every_cut(inputs, cut, group):
    assert_right(Case((300,), inputs, 4, group), CUTS[cut], 70)


@pytest.mark.parametrize("cut", ["narrow", "tall"])
def test_thresholds_per_channel(cut):
    assert_right(Case((300,), 264, per_channel=True), CUTS[cut], 40)


def test_scales_of_another_dtype():
    assert_right(Case((95,), 140, 4, 32, mx.bfloat16, scales=mx.float32), CUTS["narrow"], 65)


def test_several_bands_and_fewer_channels_than_a_span():
    assert_right(Case((4288,), 24), CUTS["narrow"]._replace(stripe=64), 34)


@pytest.mark.parametrize(("inputs", "stripe"), [(304, 150), (300, 152), (304, 152)])
def test_stripes_that_do_not_divide_by_a_unit_of_x(inputs, stripe):
    assert_right(Case((130,), inputs), CUTS["narrow"]._replace(stripe=stripe), 33)
    assert_right(Case((130,), inputs), geometry.MatrixGeometry(16, 8, 64, 1, 64, 2, 4, stripe), 17)


@pytest.mark.parametrize("outputs", [1, 64, 576, 2752 * 4, 4288, 14336, 27392, 151936])
@pytest.mark.parametrize("count", [33, 64, 65, 128, 129, 500])
def test_rule_keeps_within_what_devices_offer(count, outputs):
    for inputs, group in itertools.product((1, 64, 4095, 28672), layout.GROUP_SIZES):
        band = layout.band_of(outputs, group)
        cut = geometry.choose_matrix("cuda", [(band, -(-outputs // band))], inputs, count, 4)
        assert isinstance(cut, GemmGeometry)
        assert cut.outputs in (16, 32)  # within a group
        assert cut.tile // cut.outputs in (4, 8)
        assert cut.tokens * cut.span // 8 % cut.threads == 0  # units of x for each lane
        memory = 2 * 2 * cut.span * (cut.tile + cut.tokens)
        assert memory <= 48 << 10  # of a threadgroup, without asking CUDA for more
        assert memory * cut.blocks <= 227 << 10  # of an SM
        assert cut.threads * cut.blocks <= 2048
        assert cut.stripe % cut.span == 0
        assert cut.stripes(inputs) * cut.stripe >= inputs
        assert cut.tiles(band) * cut.tile >= band


def test_few_outputs_are_cut_into_stripes_that_fill_the_gpu():
    cut = geometry.choose_matrix("cuda", [(1024, 1)], 4096, 64, 4)
    assert cut.tiles(1024) * cut.stripes(4096) >= 0.9 * geometry.MULTIPROCESSORS


def test_the_rule_takes_it_from_33_rows_on():
    cuts = [geometry.choose_matrix("cuda", [(4096, 1)], 4096, count, 4) for count in (32, 33)]
    assert [isinstance(cut, GemmGeometry) for cut in cuts] == [False, True]
