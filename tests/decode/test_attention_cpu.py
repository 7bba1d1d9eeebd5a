"""Attention with its cache as one CPU operation: equal, bit for bit, to the module's own code on our ops."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama, qwen2
from mlx_lm.models.cache import KVCache, RotatingKVCache

from spqt_cli.backends import cpu
from spqt_cli.decode import attention_cpu, fused, hooks_cpu
from tests.conftest import layer_settings

USABLE, REASON = cpu.status()
pytestmark = [pytest.mark.skipif(not USABLE, reason=REASON), pytest.mark.usefixtures("isa")]
WIDTH = 96
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


@pytest.fixture(autouse=True)
def ops_of_ours():
    hooks_cpu.install()
    yield
    hooks_cpu.remove()


def module(model=llama, kind=None, **changes):
    """Attention of 6 heads, 2 of keys, 16 wide, random float32 layers."""
    mx.random.seed(4)
    settings = layer_settings(hidden_size=WIDTH, intermediate_size=64, head_dim=16)
    return (kind or model.Attention)(model.ModelArgs.from_dict(settings | changes))


def installed(made):
    fused.install_attention(made)
    assert attention_cpu.ATTRIBUTE in made.__dict__
    return made


def row(seed, rows=1, batch=1):
    return mx.random.normal((batch, rows, WIDTH), key=mx.random.key(seed))


def run(made, tokens, prompt=5, kept=None):
    """Outputs of `tokens` steps after a prompt, and the cache."""
    kept = kept or KVCache()
    made(row(0, prompt), "causal", kept)
    found = [np.array(made(row(1 + i), None, cache=kept)) for i in range(tokens)]
    return np.concatenate(found), kept


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": LLAMA3}, {"rope_traditional": True}], ids=str)
@pytest.mark.parametrize("model", [llama, qwen2])
def test_bit_for_bit(model, changes):
    expected, before = run(module(model, **changes), 4)
    found, kept = run(installed(module(model, **changes)), 4)
    assert np.array_equal(found, expected)
    assert kept.offset == before.offset == 9
    for ours, theirs in zip(kept.keys_and_values(), before.keys_and_values(), strict=True):
        assert mx.array_equal(ours, theirs).item()


@pytest.mark.parametrize("prompt", [126, 254])  # keys in a second stretch of 128; a cache that must grow
def test_where_work_and_room_end(prompt):
    assert np.array_equal(run(installed(module()), 5, prompt)[0], run(module(), 5, prompt)[0])


def test_it_is_one_operation(tmp_path):
    made, kept = installed(module()), KVCache()
    made(row(0, 3), "causal", kept)
    path = tmp_path / "graph.dot"
    mx.eval(kept.state)
    mx.export_to_dot(str(path), made(row(1), None, kept))
    text = path.read_text()
    assert text.count("SpqtTokenAttention") == 1
    assert not any(name in text for name in ("SpqtRope", "SpqtAttention", "SliceUpdate"))


def test_a_cache_that_somebody_else_holds_stays_as_it_was():
    made = installed(module())
    _, kept = run(made, 1)
    other = KVCache()
    other.state = kept.state
    before = np.array(other.keys)
    first = np.array(made(row(7), None, kept))
    assert np.array_equal(np.array(other.keys), before)
    assert np.array_equal(np.array(made(row(7), None, other)), first)


@pytest.mark.parametrize(
    "evaluate", [mx.eval, mx.async_eval, lambda *_: None], ids=["eval", "async", "at the end"]
)
def test_the_cache_is_not_copied(evaluate):
    form = {"dims": 16, "traditional": False, "base": 1e4, "scale": 1.0, "freqs": None}
    step = cpu.prepare_token(6, 2, 0.25, form)
    keys, values = mx.zeros((1, 2, 40000, 16)), mx.zeros((1, 2, 40000, 16))
    q, k = mx.ones((1, 1, 96)), mx.ones((1, 1, 32))
    mx.eval(keys, values, q, k)
    size, base = keys.nbytes, mx.get_active_memory()
    mx.reset_peak_memory()
    for i in range(6):
        y, keys, values = step(q, k, k, keys, values, i)
        evaluate(y)
    mx.eval(y, keys, values)
    assert mx.get_peak_memory() - base < size / 2


def test_other_caches_masks_and_rows_take_the_module_s_own_way():
    made, plain = installed(module()), module()
    cases = [
        (row(1), None, lambda: RotatingKVCache(max_size=64)),
        (row(1), mx.zeros((1, 1)), KVCache),
        (row(1, rows=3), "causal", KVCache),
        (row(1, batch=2), None, KVCache),
        (row(1), None, lambda: None),
    ]
    for x, mask, cache in cases:
        ours, theirs = made(x, mask, cache()), plain(x, mask, cache())
        assert mx.array_equal(ours, theirs).item()


def test_several_sequences_in_a_cache_of_one_kind_take_the_module_s_own_way():
    made, plain, caches = installed(module()), module(), (KVCache(), KVCache())
    for step in range(3):
        ours, theirs = (
            one(row(step, batch=2), None, cache) for one, cache in zip((made, plain), caches, strict=True)
        )
        assert mx.array_equal(ours, theirs).item()


def test_a_rope_put_in_later_is_used():
    made, plain = installed(module()), module()
    _, kept = run(made, 1)
    _, other = run(plain, 1)
    made.rope = plain.rope = lambda a, offset=0: a * 2
    assert mx.array_equal(made(row(3), None, kept), plain(row(3), None, other)).item()


def test_unknown_rotary_positions_are_left_alone():
    made = module(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64})
    fused.install_attention(made)
    assert attention_cpu.ATTRIBUTE not in made.__dict__


def test_what_does_not_fit_is_refused():
    form = {"dims": 16, "traditional": False, "base": 1e4, "scale": 1.0, "freqs": None}
    step = cpu.prepare_token(6, 2, 0.25, form)
    q, k, keys = mx.ones((1, 1, 96)), mx.ones((1, 1, 32)), mx.zeros((1, 2, 8, 16))
    padding, mask = mx.zeros((2,), mx.int32), mx.ones((2, 1, 1, 1), mx.bool_)

    def two(a):
        return mx.concatenate([a, a])

    for wrong, match in (
        ((q, k, k, keys, keys, 8), "room"),
        ((k, k, k, keys, keys, 0), "all heads"),
        ((q, q, k, keys, keys, 0), "all key heads"),
        ((q.astype(mx.float16), k, k, keys, keys, 0), "float32"),
        ((q, k, k, mx.zeros((2, 2, 8, 16)), keys, 0), "key heads, room"),
        ((two(q), two(k), two(k), two(keys), two(keys), 0), "several sequences"),
        ((two(q), two(k), two(k), two(keys), two(keys), 0, padding, None), "several sequences"),
        ((two(q), two(k), two(k), two(keys), two(keys), 0, padding[:1], mask), "one of each"),
        ((two(q), two(k), two(k), two(keys), two(keys), 3, padding, mask), "up to the token"),
    ):
        with pytest.raises(ValueError, match=match):
            step(*wrong)
    with pytest.raises(ValueError, match="do not fit"):
        cpu.prepare_token(5, 2, 0.25, form)
