"""Skipped channels are skipped 128-byte lines: the emulator counts what sparse_gemv.metal reads.

Contract: of codes, scales and biases at most density + 0.05 of the lines are read, and threadgroups together
read at most 1.10 times the distinct lines. 0.05 is what chunks that begin and end within lines may cost.
"""

import pytest

from spqt_cli.format import layout
from tests.metal.count_traffic import activity, count


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
