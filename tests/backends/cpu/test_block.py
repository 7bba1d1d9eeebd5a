"""A block's two fused steps on the CPU extension, before attention and after it.

Contract: `prepare_head` and `prepare_tail` give what their norms, products and sums give one by one.
No tolerance: both ways run the same kernels in the same order, so they are compared bit for bit.
"""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama, qwen2

from spqt_cli.backends import cpu, interface
from spqt_cli.decode import fused, hooks_cpu, layers
from tests.decode.test_fused_block import block, installed, steps, token

USABLE, REASON = cpu.status()
pytestmark = [pytest.mark.skipif(not USABLE, reason=REASON), pytest.mark.usefixtures("decode_steps", "isa")]


@pytest.fixture(autouse=True)
def ops_of_ours():
    """The separate norms must be ours as well, or the comparison is with other roundings."""
    hooks_cpu.install()
    yield
    hooks_cpu.remove()


def separate(model=llama):
    """A block whose feed-forward module is one operation, and nothing else is."""
    made = block(model)
    fused.install_mlp(made.mlp)
    return made


@pytest.mark.parametrize("model", [llama, qwen2])  # qwen2 has biases
def test_bit_for_bit(model):
    expected, shares = steps(separate(model))
    found, counted = steps(installed(block(model)))
    assert np.array_equal(found, expected)
    assert sorted(counted.values()) == sorted(shares.values())


def test_three_operations_replace_the_block(tmp_path):
    made = installed(block())
    path = tmp_path / "graph.dot"
    mx.export_to_dot(str(path), made(token(5)))
    text = path.read_text()
    assert (text.count("SpqtHead"), text.count("SpqtTail")) == (1, 1)
    assert "SpqtSparseGemv" not in text
    assert "SpqtRmsNorm" not in text


def test_dense_layers_and_no_counts():
    made, whole = separate(), installed(block())
    for one in (made, whole):
        for layer in layers.zigzag_layers(one).values():
            layer.set_threshold(None)
    assert mx.array_equal(made(token(5)), whole(token(5))).item()


def parts(made):
    attention, mlp = made.self_attn, made.mlp
    norm = interface.Norm(made.post_attention_layernorm["weight"], 1e-5)
    return interface.Tail(attention.o_proj, norm, [mlp.gate_proj, mlp.up_proj], mlp.down_proj)


@pytest.mark.parametrize("given", [(0, 0, 0), (1, 0, 0), (0, 1, 1), (1, 1, 1)])
def test_counts_go_on_from_those_given(given):
    step = cpu.prepare_tail(token(5), parts(block()))
    before = [mx.array([7, 9][:n], dtype=mx.uint32) for n in (1, 2, 1)]
    _, fresh = step(token(6), token(5), [None] * 3)
    _, found = step(token(6), token(5), [b if g else None for b, g in zip(before, given, strict=True)])
    for now, alone, b, g in zip(found, fresh, before, given, strict=True):
        assert (now == (alone + b if g else alone)).all()


def test_equal_for_any_number_of_threads():
    before, found = cpu.threads(), []
    try:
        for count in (1, 2, 3):
            cpu.set_threads(count)
            found += [steps(installed(block()))[0] for _ in range(2)]
    finally:
        cpu.set_threads(before)
    assert all(np.array_equal(one, found[0]) for one in found)


def test_blocks_in_one_graph_do_not_share_what_lies_between():
    made = [installed(block()) for _ in range(2)]
    y = made[1](made[0](token(5)))
    alone = made[0](token(5))
    mx.eval(alone)
    assert mx.array_equal(y, made[1](alone)).item()


def test_strided_input():
    made = block()
    step = cpu.prepare_tail(token(5), parts(made))
    wide = mx.repeat(token(6), 2, axis=-1)[..., ::2], mx.repeat(token(5), 2, axis=-1)[..., ::2]
    assert mx.array_equal(step(*wide, [None] * 3)[0], step(token(6), token(5), [None] * 3)[0]).item()


def test_what_does_not_fit_is_refused():
    made, x = block(), token(5)
    tail, half = parts(made), token(5).astype(mx.float16)
    half_norm = interface.Norm(tail.norm.weight.astype(mx.float16), 1e-5)
    assert cpu.prepare_tail(half, tail) is None
    assert cpu.prepare_tail(x, tail._replace(norm=half_norm)) is None
    assert cpu.prepare_head(half_norm, [tail.out]) is None
    step = cpu.prepare_tail(x, tail)
    with pytest.raises(ValueError, match="float32"):
        step(half, x, [None] * 3)
    with pytest.raises(ValueError, match="three counts"):
        step(x, x, [None])
    with pytest.raises(ValueError, match="as many rows"):
        step(mx.zeros((2, 192)), x, [None] * 3)
    with pytest.raises(ValueError, match="64 rows"):
        step(x, mx.zeros((65, 192)), [None] * 3)
    with pytest.raises(ValueError, match="channels"):
        cpu.prepare_tail(x, tail._replace(down=made.mlp.up_proj))
