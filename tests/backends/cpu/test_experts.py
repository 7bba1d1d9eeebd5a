"""Products by chosen experts on the CPU extension.

Contract: a row of `prepare_experts` is `cpu.sparse_gemv` of that row with that expert's matrix alone, bit for
bit, and `experts_matmul` is the definition's product; that `sparse_gemv` is right is test_products.py's.
"""

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.backends import cpu, stock
from spqt_cli.format import layout
from tests.backends.cpu.test_products import FLOAT_TOLERANCE, Layer, as_float64

USABLE, REASON = cpu.status()
pytestmark = [pytest.mark.skipif(not USABLE, reason=REASON), pytest.mark.usefixtures("isa")]


class Stack(dict):
    """Experts as `interface.Experts`; `alone[e]` is one of them by itself."""

    def __init__(self, experts, shape, bits=4, group_size=64, *, bias=False, threshold=0.0, **form):
        super().__init__()
        self.alone = [
            Layer(shape, bits, group_size, threshold=threshold, seed=e, **form) for e in range(experts)
        ]
        for name in ("weight", "scales", "biases"):
            self[name] = mx.stack([one[name] for one in self.alone])
        self.outputs, self.bits, self.group_size = shape[0], bits, group_size
        self.threshold = self.alone[0].threshold
        if bias:
            self["bias"] = normal(experts, shape[0], seed=9)
            for one, own in zip(self.alone, self["bias"], strict=True):
                one["bias"] = own

    def __getattr__(self, name):
        return self[name]


def normal(*shape, seed=3):
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def chosen(*shape, experts, seed=4):
    return mx.array(np.random.default_rng(seed).integers(0, experts, shape)).astype(mx.uint32)


def check(x, indices, stacks):
    """x (tokens, 1, 1, inputs), the same for all experts, or (tokens, chosen, 1, inputs), a row for each."""
    ys, active = cpu.prepare_experts(stacks)(x, indices, mx.full((len(stacks),), 5, mx.uint32))
    wide = mx.broadcast_to(x, (*indices.shape, 1, x.shape[-1]))
    for number, (y, stack) in enumerate(zip(ys, stacks, strict=True)):
        assert y.shape == (*indices.shape, 1, stack.outputs)
        assert y.dtype == x.dtype
        count = 5  # what was counted before
        for at in np.ndindex(*indices.shape):
            one, number_active = cpu.sparse_gemv(wide[at], [stack.alone[indices[at].item()]])
            assert mx.array_equal(y[at], one[0])
            count += number_active.item()
        assert active[number].item() == count


@pytest.mark.parametrize("group_size", layout.GROUP_SIZES)
@pytest.mark.parametrize("bits", layout.BITS)
def test_every_format(bits, group_size):
    dtype = (mx.float32, mx.float16, mx.bfloat16)[bits % 3]
    stack = Stack(3, (330, 141), bits, group_size, dtype=dtype, threshold=0.6)
    check(normal(2, 1, 1, 141), chosen(2, 2, experts=3), [stack])


def test_gate_and_up_of_all_chosen_experts_together():
    pair = [
        Stack(5, (192, 96), threshold=0.5, bias=True),
        Stack(5, (320, 96), bits=5, group_size=32, threshold=1.0),
    ]
    check(normal(1, 1, 1, 96), chosen(1, 4, experts=5), pair)


def test_each_chosen_expert_with_its_own_row():
    check(normal(3, 4, 1, 192), chosen(3, 4, experts=5), [Stack(5, (96, 192), threshold=0.7, bias=True)])


@pytest.mark.parametrize("outputs", [31, 1100, 9000])
def test_bands_and_tiles_not_full(outputs):
    check(normal(1, 1, 1, 21), chosen(1, 2, experts=2), [Stack(2, (outputs, 21), 4, 32, threshold=0.5)])


def test_several_bands_in_each_expert():
    stack = Stack(3, (320, 50), 4, 32, band=64, threshold=0.5, bias=True)
    x, indices = normal(2, 1, 1, 50), chosen(2, 3, experts=3)
    check(x, indices, [stack])
    found = cpu.experts_matmul(x, indices, stack, False)
    assert near(found, stock.experts_matmul(x, indices, stack, False))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_inputs_of_16_bits(dtype):
    check(normal(2, 1, 1, 64).astype(dtype), chosen(2, 2, experts=3), [Stack(3, (96, 64), threshold=0.5)])


def test_the_most_that_a_step_takes():
    check(normal(64, 1, 1, 24), chosen(64, 8, experts=4), [Stack(4, (40, 24), 4, 32, threshold=0.5)])
    with pytest.raises(ValueError, match="1 to 512"):
        cpu.prepare_experts([Stack(2, (40, 24))])(normal(1, 1, 1, 24), chosen(1, 513, experts=2), None)


def test_threads_change_nothing():
    stack = Stack(4, (2000, 300), threshold=0.4)
    x, indices = normal(2, 1, 1, 300), chosen(2, 3, experts=4)
    before, found = cpu.threads(), []
    try:
        for threads in (1, 2, 5):
            cpu.set_threads(threads)
            found.append(cpu.prepare_experts([stack])(x, indices, None)[0][0])
            mx.eval(found[-1])
    finally:
        cpu.set_threads(before)
    assert mx.array_equal(found[0], found[1])
    assert mx.array_equal(found[0], found[2])


def near(found, wanted):
    found, wanted = as_float64(found), as_float64(wanted)
    return np.linalg.norm(found - wanted) <= FLOAT_TOLERANCE * np.linalg.norm(wanted)


@pytest.mark.parametrize("bits", layout.BITS)
def test_many_rows_are_the_definition_s_product(bits):
    stack = Stack(5, (330, 70), bits, 32, dtype=mx.float32, bias=True)
    x, indices = normal(900, 1, 1, 70), chosen(900, 3, experts=5)  # more rows of each than one task takes
    found = cpu.experts_matmul(x, indices, stack, False)
    assert found.shape == (900, 3, 1, 330)
    assert near(found, stock.experts_matmul(x, indices, stack, False))


def test_rows_sorted_by_expert_and_rows_in_any_order_are_the_same():
    stack = Stack(4, (96, 64))
    x, indices = normal(50, 1, 64), mx.sort(chosen(50, experts=4))
    assert mx.array_equal(
        cpu.experts_matmul(x, indices, stack, True), cpu.experts_matmul(x, indices, stack, False)
    )


def test_several_rows_for_one_index_and_indices_for_several_tokens():
    stack = Stack(3, (96, 64))
    for x, indices in (
        (normal(2, 3, 5, 64), chosen(2, 3, experts=3)),
        (normal(4, 3, 1, 64), mx.arange(3, dtype=mx.uint32)[None]),
    ):
        wanted = stock.experts_matmul(x, indices, stack, False)
        assert near(cpu.experts_matmul(x, indices, stack, False), wanted)
        if x.shape[-2] == 1:
            assert near(cpu.prepare_experts([stack])(x, indices, None)[0][0], wanted)


def test_the_product_of_many_rows_has_gradients():
    stack = Stack(3, (96, 64), bias=True)
    x, indices = normal(4, 1, 1, 64), chosen(4, 2, experts=3)
    slope = mx.grad(lambda v: (cpu.experts_matmul(v, indices, stack, False) ** 2).sum())(x)
    wanted = mx.grad(lambda v: (stock.experts_matmul(v, indices, stack, False) ** 2).sum())(x)
    assert near(slope, wanted)


def test_an_index_without_an_expert_has_no_numbers():
    stack = Stack(2, (96, 64), bias=True)
    x, indices = normal(1, 1, 1, 64), mx.array([[0, 7, 1]], mx.uint32)
    for y in (
        cpu.prepare_experts([stack])(x, indices, None)[0][0],
        cpu.experts_matmul(x, indices, stack, False),
    ):
        found = np.isnan(np.array(y)).all(axis=(-1, -2))
        assert found.tolist() == [[False, True, False]]
        assert np.isfinite(np.array(y)[0, [0, 2]]).all()


def test_what_does_not_fit_is_refused():
    stack = Stack(2, (96, 64))
    with pytest.raises(ValueError, match="channels"):
        cpu.prepare_experts([stack])(normal(1, 1, 1, 65), chosen(1, 1, experts=2), None)
    stack["bias"] = mx.zeros((2, 95))
    with pytest.raises(ValueError, match="experts, outputs"):
        cpu.prepare_experts([stack])
