"""The Zigzag layout against float64 arithmetic on the codes themselves."""

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.errors import UsageError
from spqt_cli.format import layout

BITS = layout.BITS
GROUPS = layout.GROUP_SIZES
SHAPES = [(1, 1), (33, 5), (64, 96), (130, 64), (576, 48), (200, 100)]  # (outputs, inputs)


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes of the last axis, read bit by bit: independent of MLX and of word boundaries."""
    as_bytes = np.ascontiguousarray(words).view(np.uint8)
    stream = np.unpackbits(as_bytes, axis=-1, bitorder="little")
    stream = stream.reshape(*stream.shape[:-1], -1, bits)
    return (stream.astype(np.int64) << np.arange(bits)).sum(axis=-1)


def oracle(weight, scales, biases, outputs: int, bits: int, group_size: int) -> np.ndarray:
    """The (outputs, inputs) matrix in float64, from codes, scales and biases."""
    codes = unpack(np.array(weight), bits).astype(np.float64)
    scale = np.repeat(np.array(scales, dtype=np.float64), group_size, axis=-1)
    bias = np.repeat(np.array(biases, dtype=np.float64), group_size, axis=-1)
    bands = codes * scale + bias
    return bands.swapaxes(1, 2).reshape(-1, bands.shape[1])[:outputs]


def random_matrix(outputs: int, inputs: int, seed: int = 0) -> mx.array:
    return mx.random.normal((outputs, inputs), key=mx.random.key(seed))


@pytest.mark.parametrize(
    ("outputs", "group_size", "band"),
    [
        (13696, 64, 6848),
        (27392, 64, 6848),
        (151936, 64, 8000),
        (32064, 64, 8064),
        (4288, 64, 4288),
        (4095, 64, 4096),
        (576, 64, 576),
        (14336, 64, 7168),
        (11008, 64, 5504),
        (11008, 128, 5504),
        (1, 32, 32),
    ],
)
def test_band_rule(outputs, group_size, band):
    assert layout.band_of(outputs, group_size) == band


@pytest.mark.parametrize("group_size", GROUPS)
def test_band_never_leaves_an_empty_band_and_wastes_less_than_a_group_per_band(group_size):
    for outputs in [*range(1, 700, 13), *range(4000, 30000, 517), 128256]:
        band = layout.band_of(outputs, group_size)
        bands = -(-outputs // band)
        rows = -(-outputs // group_size) * group_size
        assert band % group_size == 0
        assert band <= layout.MAX_BAND
        assert 0 <= bands * band - rows < bands * group_size


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
def test_codes_scales_and_biases_mean_what_the_contract_says(bits, group_size):
    for outputs, inputs in SHAPES:
        w = random_matrix(outputs, inputs)
        band = layout.band_of(outputs, group_size)
        packed = layout.quantize(w, bits, group_size, band)
        shapes = layout.packed_shapes((outputs, inputs), bits, group_size, band)
        assert tuple(part.shape for part in packed) == (shapes[0], shapes[1], shapes[1])
        expected = oracle(*packed, outputs, bits, group_size)
        restored = layout.dequantize(*packed, outputs=outputs, bits=bits, group_size=group_size)
        # One float32 multiply and add: two roundings of values below max|w| + one scale.
        tolerance = 4 * np.finfo(np.float32).eps * (np.abs(expected).max() + 1)
        np.testing.assert_allclose(np.array(restored), expected, atol=tolerance)
        # Rounding to the nearest code is off by at most one scale (MLX moves the range a little).
        scale = (
            np.repeat(np.array(packed[1]), group_size, axis=-1).swapaxes(1, 2).reshape(-1, inputs)[:outputs]
        )
        assert (np.abs(expected - np.array(w)) <= np.abs(scale) + tolerance).all()


@pytest.mark.parametrize("bits", BITS)
def test_matmul_agrees_with_float64(bits):
    for (outputs, inputs), rows in zip(SHAPES, [1, 2, 7, 33, 3, 1], strict=True):
        packed = layout.quantize(random_matrix(outputs, inputs), bits, 32, layout.band_of(outputs, 32))
        x = mx.random.normal((2, rows, inputs), key=mx.random.key(rows))
        y = layout.matmul(x, *packed, outputs=outputs, bits=bits, group_size=32)
        w = oracle(*packed, outputs, bits, 32)
        exact = np.array(x, dtype=np.float64) @ w.T
        # float32 sums of `inputs` terms: gamma_n * sum |x||w|, n = inputs plus a few for scale and bias.
        bound = (inputs + 8) * np.finfo(np.float32).eps * (np.abs(np.array(x)) @ np.abs(w).T + 1)
        assert y.shape == (2, rows, outputs)
        assert (np.abs(np.array(y) - exact) <= bound).all()


@pytest.mark.parametrize("outputs", [33, 63, 65, 4095, 4288])
def test_padding_is_invisible_bit_for_bit(outputs):
    """Rows beside the padding get the codes that they would get without it."""
    w = random_matrix(outputs, 24)
    band = layout.band_of(outputs, 32)
    whole = layout.quantize(w, 4, 32, band)
    restored = layout.dequantize(*whole, outputs=outputs, bits=4, group_size=32)
    for start in range(0, outputs, 32):
        rows = w[start : start + 32]
        alone = layout.quantize(rows, 4, 32, 32)
        expected = layout.dequantize(*alone, outputs=rows.shape[0], bits=4, group_size=32)
        assert mx.array_equal(restored[start : start + 32], expected)


def test_a_two_dimensional_input_meets_every_band():
    packed = layout.quantize(random_matrix(96, 16), 4, 32, 32)
    x = mx.random.normal((3, 16), key=mx.random.key(1))
    flat = layout.matmul(x, *packed, outputs=96, bits=4, group_size=32)
    assert flat.shape == (3, 96)
    assert mx.array_equal(flat, layout.matmul(x[None], *packed, outputs=96, bits=4, group_size=32)[0])


def test_fault_21_all_zero_group_gives_exact_zeros():
    w = mx.zeros((64, 8))
    for bits in BITS:
        packed = layout.quantize(w, bits, 32, 64)
        assert mx.array_equal(layout.dequantize(*packed, outputs=64, bits=bits, group_size=32), w)


def test_fault_23_outputs_not_divisible_give_the_trimmed_result():
    w = random_matrix(100, 40)
    packed = layout.quantize(w, 8, 64, layout.band_of(100, 64))
    y = layout.matmul(mx.eye(40), *packed, outputs=100, bits=8, group_size=64)
    assert mx.array_equal(y.T, layout.dequantize(*packed, outputs=100, bits=8, group_size=64))


def test_mask_keeps_the_boundary_and_nan():
    x = mx.array([0.5, -0.5, 0.4999, -0.2, float("nan"), 0.0, float("inf")])
    kept = np.array(layout.mask(x, mx.array([0.5])))
    np.testing.assert_array_equal(kept, [0.5, -0.5, 0, 0, np.nan, 0, np.inf])
    assert not layout.inactive(x, mx.array([0.0])).any()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_mask_compares_in_float32(dtype):
    """A threshold between two 16-bit values must not be rounded to one of them."""
    x = mx.array([0.1], dtype=dtype)
    value = x.astype(mx.float32).item()
    above = np.nextafter(np.float32(value), np.float32(1))
    assert layout.mask(x, mx.array([value])).item() == value
    assert layout.mask(x, mx.array([float(above)])).item() == 0


def test_mask_takes_a_threshold_per_channel():
    x = mx.array([[1.0, 1.0, 1.0]])
    assert layout.mask(x, mx.array([0.5, 1.0, 1.5])).tolist() == [[1.0, 1.0, 0.0]]


@pytest.mark.parametrize(("bits", "group_size"), [(7, 64), (4, 48), (0, None), (None, 0), (1, 32), (4, -64)])
def test_settings_that_mlx_does_not_pack(bits, group_size):
    with pytest.raises(UsageError):
        layout.check(bits, group_size)
    assert not layout.is_packable(bits, group_size)


@pytest.mark.parametrize(("bits", "group_size"), [("4", 64), (True, 64), (4.0, 64), (4, None), ([], {})])
def test_settings_that_are_no_integers(bits, group_size):
    """As a config.json may hold them."""
    assert not layout.is_packable(bits, group_size)


@pytest.mark.parametrize("bits", layout.BITS)
@pytest.mark.parametrize("group_size", layout.GROUP_SIZES)
def test_settings_that_mlx_packs(bits, group_size):
    layout.check(bits, group_size)
    assert layout.is_packable(bits, group_size)
    layout.check(None, None)
    mx.eval(layout.quantize(mx.zeros((group_size, 32)), bits, group_size, group_size))


@pytest.mark.parametrize("group_size", layout.GROUP_SIZES)
@pytest.mark.parametrize("bits", layout.BITS)
def test_pack_is_what_mlx_unpacks(bits, group_size):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 3, 2 * group_size), np.uint8)
    weight = mx.array(layout.pack(codes, bits))
    ones = mx.ones((2, 3, 2))
    got = mx.dequantize(weight, ones, mx.zeros_like(ones), group_size=group_size, bits=bits)
    np.testing.assert_array_equal(np.array(got), codes)
    assert weight.dtype == mx.uint32


def test_experts_are_matrices_one_after_another():
    w = mx.stack([random_matrix(96, 24) * (e + 1) for e in range(3)])
    packed = layout.quantize(w, 4, 32, 64)  # two bands, the last one filled
    shapes = layout.packed_shapes(w.shape, 4, 32, 64)
    assert tuple(part.shape for part in packed) == (shapes[0], shapes[1], shapes[1])
    restored = layout.dequantize(*packed, outputs=96, bits=4, group_size=32)
    for expert, matrix in enumerate(w):
        alone = layout.quantize(matrix, 4, 32, 64)
        assert all(mx.array_equal(a[expert], b) for a, b in zip(packed, alone, strict=True))
        assert mx.array_equal(restored[expert], layout.dequantize(*alone, outputs=96, bits=4, group_size=32))


@pytest.mark.parametrize("band", [32, 64, 96])
def test_products_by_experts_agree_with_float64(band):
    w = mx.stack([random_matrix(96, 24) * (e + 1) for e in range(3)])
    packed = layout.quantize(w, 4, 32, band)
    plain = np.array(layout.dequantize(*packed, outputs=96, bits=4, group_size=32), dtype=np.float64)
    form = {"outputs": 96, "bits": 4, "group_size": 32}
    for x_shape, indices in (
        ((2, 1, 1, 24), mx.array([[0, 2], [1, 1]], mx.uint32)),  # a token's row for all of its experts
        ((2, 2, 1, 24), mx.array([[2, 0], [1, 2]], mx.uint32)),  # a row for each
        ((5, 3, 24), mx.array([0, 0, 1, 1, 2], mx.uint32)),  # sorted, several rows
    ):
        x = mx.random.normal(x_shape, key=mx.random.key(1))
        for in_order in (False, indices.ndim == 1):
            y = layout.gather_matmul(x, indices, *packed, **form, sorted_indices=in_order)
            exact = np.array(x, dtype=np.float64) @ plain[np.array(indices)].swapaxes(-1, -2)
            assert y.shape == exact.shape
            np.testing.assert_allclose(np.array(y), exact, atol=1e-5 * np.abs(exact).max())
