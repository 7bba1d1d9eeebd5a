"""Skipped channels are skipped 128-byte lines: the emulator counts what sparse_gemv.metal reads.

Contract: of codes, scales and biases at most density + 0.05 of the lines are read, and threadgroups together
read at most 1.10 times the distinct lines. 0.05 is what chunks that begin and end within lines may cost.
"""

import numpy as np
import pytest

from spqt_cli.backends.gpu import geometry
from spqt_cli.format import layout
from tests.metal.count_traffic import activity, count, count_rows


def checked(shape, bits, band, active):
    found = count(shape, bits, band, active)
    assert found.faults == []
    allowed = found.density + 0.05 if found.density < 1 else 1.03
    assert found.distinct <= allowed
    assert found.summed <= 1.10
    return found


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("density", [0.25, 0.5, 0.75, 1.0])
def test_lines_follow_density(bits, clustered, density):
    checked((4096, 2048), bits, layout.band_of(4096, 64), activity(2048, density, clustered))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("outputs", [14336, 11008])
def test_bands_of_no_whole_lines(outputs, clustered, bits):
    checked((outputs, 1024), bits, layout.band_of(outputs, 64), activity(1024, 0.5, clustered))


def test_narrow_chunks_are_hardly_skipped():
    found = count((4096, 1024), 4, 64, activity(1024, 0.5, False))
    assert found.distinct > 0.9


@pytest.mark.parametrize("kind", ["cuda", "g", "d"])
@pytest.mark.parametrize("number", [2, 4, 8])
def test_up_to_eight_rows_read_the_weights_once(number, kind):
    """Lines of codes once; those of scales, an eighth of them, by each tile that has outputs of them."""
    found = count_rows((4096, 1024), 4, np.ones((number, 1024), bool), kind)
    assert found.faults == []
    assert found.distinct <= 1.03
    tiles = geometry.choose_rows(kind, [(4096, 1)], 1024, number).tiles(4096)
    assert found.summed <= 1.03 + (tiles - 1) / 9
    assert found.partials <= 1.0  # sums of stripes, written and read


def test_nine_rows_read_them_twice():
    found = count_rows((4096, 512), 4, np.ones((9, 512), bool))
    assert found.summed >= 2 * 0.97


def test_channels_that_no_row_needs_are_skipped():
    active = np.stack([activity(512, 0.3, False), np.roll(activity(512, 0.3, False), 7)])
    found = count_rows((4096, 512), 4, active)
    assert found.faults == []
    assert 0.45 < found.density < 0.6
    assert found.distinct <= found.density + 0.05
