"""A few rows of a decode step on the CPU extension.

Contract: `cpu.sparse_rows` is `cpu.sparse_gemv` of each row, bit for bit, whatever runs beside it, with each
row's own counts; beyond FEW_ROWS it is the masked product of many rows. That `sparse_gemv` is right is
test_products.py's.
"""

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.backends import cpu
from spqt_cli.format import layout
from tests.backends.cpu.test_products import FLOAT_TOLERANCE, Layer, as_float64, expected

USABLE, REASON = cpu.status()
pytestmark = [pytest.mark.skipif(not USABLE, reason=REASON), pytest.mark.usefixtures("isa")]


def random_rows(*shape, seed=3):
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def check(x, layers):
    """Each row beside the others is what it is alone."""
    ys, active = cpu.sparse_rows(x, layers)
    rows = x.reshape(-1, x.shape[-1])
    assert active.shape == (len(layers), len(rows))
    alone = [cpu.sparse_gemv(row, layers) for row in rows]
    for number, (y, layer) in enumerate(zip(ys, layers, strict=True)):
        assert y.shape == (*x.shape[:-1], layer.outputs)
        assert y.dtype == x.dtype
        for r, one in enumerate(y.reshape(-1, layer.outputs)):
            assert mx.array_equal(one, alone[r][0][number].reshape(-1))
            assert active[number, r].item() == alone[r][1][number].item()


@pytest.mark.parametrize("group_size", layout.GROUP_SIZES)
@pytest.mark.parametrize("bits", layout.BITS)
def test_every_format(bits, group_size):
    rows = 2 + (bits + group_size // 32) % 7
    dtype = (mx.float32, mx.float16, mx.bfloat16)[bits % 3]
    layer, x = Layer((330, 141), bits, group_size, dtype=dtype, threshold=0.6), random_rows(rows, 1, 141)
    check(x, [layer])
    for r, y in enumerate(cpu.sparse_rows(x, [layer])[0][0]):
        want, _ = expected(x[r], layer)
        assert np.linalg.norm(as_float64(y).ravel() - want) <= FLOAT_TOLERANCE * np.linalg.norm(want)


@pytest.mark.parametrize("rows", [*range(2, 10), 16, 17, 31, 32])
def test_every_number_of_rows(rows):
    layers = [
        Layer((576, 200), threshold=0.3),
        Layer((192, 200), seed=1),
        Layer((192, 200), seed=2, threshold=1.1),
    ]
    check(random_rows(rows, 200), layers)


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.8, 1.2, 2.0, 5.0])
@pytest.mark.parametrize("rows", [2, 3, 5, 8, 9])
def test_rows_that_have_few_channels_in_common_and_many(rows, threshold):
    """With high thresholds each row is multiplied by itself, with low ones they are together."""
    check(
        random_rows(rows, 150),
        [Layer((330, 150), threshold=threshold), Layer((96, 150), 5, threshold=threshold)],
    )


def test_a_task_too_large_to_be_read_row_after_row():
    """Stripes of more than APART_BYTES (cpu/job.cpp), whose rows have few channels in common."""
    check(random_rows(3, 4300), [Layer((8192, 4300), 8, 128, threshold=1.5)])


@pytest.mark.parametrize("outputs", [31, 1100, 9000])
def test_tiles_not_full(outputs):
    check(
        random_rows(5, 21), [Layer((outputs, 21), 4, 32, threshold=0.5), Layer((outputs, 21), 5, 32, seed=1)]
    )


def test_a_row_that_needs_nothing_and_one_that_needs_all():
    x = mx.concatenate([mx.zeros((1, 90)), mx.ones((1, 90)), random_rows(1, 90)])
    layer = Layer((100, 90), threshold=0.5)
    layer["bias"] = random_rows(100)
    check(x, [layer])
    assert mx.array_equal(cpu.sparse_rows(x, [layer])[0][0][0], layer["bias"])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_inputs_of_16_bits(dtype):
    check(random_rows(3, 64).astype(dtype), [Layer((96, 64), threshold=0.5)])


def test_threshold_of_each_channel_and_strided_rows():
    layer = Layer((64, 50), threshold=np.linspace(0, 2, 50).astype(np.float32))
    check(random_rows(50, 4)[:, ::2].T, [layer])


def test_a_row_with_nan_leaves_the_others_as_they_are():
    x, layer = random_rows(4, 70), Layer((128, 70), threshold=0.5)
    spoiled = mx.where(mx.arange(4)[:, None] == 2, mx.nan, x)
    found, right = cpu.sparse_rows(spoiled, [layer])[0][0], cpu.sparse_rows(x, [layer])[0][0]
    assert mx.all(mx.isnan(found[2]))
    for r in (0, 1, 3):
        assert mx.array_equal(found[r], right[r])


def test_threads_change_nothing():
    x, layer = random_rows(6, 300), Layer((2000, 300), threshold=0.4)
    before = cpu.threads()
    try:
        found = []
        for threads in (1, 2, 5):
            cpu.set_threads(threads)
            found.append(cpu.sparse_rows(x, [layer])[0][0])
            mx.eval(found[-1])
    finally:
        cpu.set_threads(before)
    assert mx.array_equal(found[0], found[1])
    assert mx.array_equal(found[0], found[2])


@pytest.mark.parametrize("shape", [(0, 1, 64), (0, 64), (0, 3, 64)])
def test_no_rows(shape):
    assert cpu.matmul(mx.zeros(shape), Layer((96, 64))).shape == (*shape[:-1], 96)


def test_more_rows_are_masked_and_multiplied_as_many():
    x, layer = random_rows(cpu.FEW_ROWS + 1, 64), Layer((96, 64), threshold=0.5)
    (y,), active = cpu.sparse_rows(x, [layer])
    for r in range(len(x)):
        want, count = expected(x[r], layer)
        assert active[0, r].item() == count
        assert np.linalg.norm(as_float64(y[r]) - want) <= FLOAT_TOLERANCE * np.linalg.norm(want)
