"""Blocks that follow one another as one CPU operation: equal bits, counts and caches."""

import copy
import gc
import weakref

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import llama, qwen2
from mlx_lm.models.cache import KVCache, make_prompt_cache

from spqt_cli.backends import cpu
from spqt_cli.decode import active_counts, chain, fused, hooks, layers, phase
from tests.conftest import layer_settings

USABLE, REASON = cpu.status()
pytestmark = [pytest.mark.skipif(not USABLE, reason=REASON), pytest.mark.usefixtures("decode_steps")]
WIDTH, BLOCKS = 192, 3


def model(kind=llama, blocks=BLOCKS, threshold=0.3):
    """Random Zigzag blocks of 6 heads, 2 of keys; with a threshold they skip some channels."""
    mx.random.seed(3)
    hooks.install()
    settings = layer_settings(hidden_size=WIDTH, intermediate_size=448, head_dim=32, num_hidden_layers=blocks)
    made = kind.Model(kind.ModelArgs.from_dict(settings))
    is_linear = lambda path, m: isinstance(m, nn.Linear) and "head" not in path  # noqa: E731
    nn.quantize(made, 64, 4, mode="zigzag", class_predicate=is_linear)
    layers.share_inputs(made)
    for layer in layers.zigzag_layers(made).values():
        layer.set_threshold(threshold)
    fused.install(made)
    mx.eval(made.parameters())
    return made


def prompted(made, tokens=5):
    caches = make_prompt_cache(made)
    with phase.prompting():
        mx.eval(made((mx.arange(tokens) % 50)[None], cache=caches))
    return caches


def steps(made, caches, count=5, first=7):
    """Each token's logits, one after another, and the active share of each layer."""
    with active_counts.counting() as counter:
        found = [made(mx.array([[first + i]]), cache=caches) for i in range(count)]
        mx.eval(found)
    shares = dict(named(made, counter.densities()))
    return np.array(mx.concatenate(found)), shares


def named(made, densities):
    paths = {id(layer): path for path, layer in layers.zigzag_layers(made).items()}
    return [(paths[id(layer)], share) for layer, share in densities]


def chains(made):
    """The chain of each block."""
    found = [block.__dict__[fused.BLOCK].chain for block in made.layers]
    return [one and one() for one in found]


@pytest.fixture
def runs(monkeypatch):
    """How many blocks each call of an operation of several computed."""
    called, real = [], cpu.prepare_chain

    class Noted:
        def __init__(self, blocks):
            self.blocks, self.step = len(blocks), real(blocks)
            self.takes = self.step.takes

        def __call__(self, *args):
            called.append(self.blocks)
            return self.step(*args)

    monkeypatch.setattr(cpu, "prepare_chain", Noted)
    return called


def expected(kind, **changes):
    """The same model's steps, block by block."""
    made = model(kind, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "ran", lambda *_: None)
        caches = prompted(made)
        return *steps(made, caches), caches


@pytest.mark.parametrize("kind", [llama, qwen2])
@pytest.mark.parametrize("threshold", [0.3, None])
def test_bit_for_bit(kind, threshold, runs):
    alone, shares, kept = expected(kind, threshold=threshold)
    made = model(kind, threshold=threshold)
    caches = prompted(made)
    found, counted = steps(made, caches)
    assert runs == [BLOCKS] * 3  # the first token showed which blocks follow one another, the second began
    assert np.array_equal(found, alone)
    assert counted == shares
    assert bool(shares) is (threshold is not None)
    for mine, theirs in zip(caches, kept, strict=True):
        assert mine.offset == theirs.offset == 10
        for a, b in zip(mine.keys_and_values(), theirs.keys_and_values(), strict=True):
            assert mx.array_equal(a, b).item()


def test_many_blocks_are_several_operations(runs):
    blocks = 2 * chain.MOST + 1
    alone, shares, _ = expected(llama, blocks=blocks)
    made = model(blocks=blocks)
    found, counted = steps(made, prompted(made), count=3)
    assert runs == [6, 6, 5, 6, 6]  # the second token's first part ran block by block
    assert np.array_equal(found, alone[:3])
    assert set(counted) == set(shares)


def test_another_cache_begins_anew(runs):
    made = model()
    first, second = prompted(made), prompted(made, 9)
    steps(made, first, count=3)
    known = chains(made)
    del runs[:]
    steps(made, second, count=3)
    assert runs == [BLOCKS]
    assert chains(made) == known  # the same operation
    alone, _, _ = expected(llama)
    assert np.array_equal(steps(made, prompted(made))[0], alone)


def test_past_the_cache_s_room(runs):
    """KVCache grows by 256: that token runs block by block."""
    made = model()
    caches = prompted(made, 253)
    found, _ = steps(made, caches, count=8)
    assert runs == [BLOCKS] * 5  # 255; not 256, which has no room; from 257 on
    other = copy.deepcopy(made)
    for block in other.layers:
        assert block.__dict__[fused.BLOCK].chain is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "ran", lambda *_: None)
        assert np.array_equal(steps(other, prompted(other, 253), count=8)[0], found)


def test_a_cache_that_somebody_else_holds_stays_as_it_was():
    made = model()
    caches = prompted(made)
    steps(made, caches, count=3)
    held = [one.keys for one in caches]
    before = [np.array(keys) for keys in held]
    steps(made, caches, count=1)
    for keys, values in zip(held, before, strict=True):
        assert np.array_equal(np.array(keys), values)
    assert np.array(caches[0].keys)[:, :, 8].any()
    assert not before[0][:, :, 8].any()


@pytest.mark.parametrize(
    "evaluate", [mx.eval, mx.async_eval, lambda *_: None], ids=["eval", "async", "at the end"]
)
def test_the_cache_is_not_copied(evaluate):
    made = model()
    steps(made, prompted(made), count=3)
    run = chains(made)[0]._run
    keys, values = ([mx.zeros((1, 2, 20000, 32)) for _ in range(BLOCKS)] for _ in range(2))
    x = mx.ones((1, 1, WIDTH))
    mx.eval(keys, values, x)
    base = mx.get_active_memory()
    mx.reset_peak_memory()
    for i in range(6):
        y, keys, values, _ = run(x, keys, values, [i] * BLOCKS, None, None)
        evaluate(y)
    mx.eval(y, keys, values)
    assert mx.get_peak_memory() - base < keys[0].nbytes / 2


def test_new_thresholds_and_layers_are_seen(runs):
    made = model()
    caches = prompted(made)
    steps(made, caches, count=3)
    for path, layer in layers.zigzag_layers(made).items():
        kept = layer.threshold
        layer.set_threshold(2.0)
        trial = copy.deepcopy(caches)
        before = len(runs)
        found, _ = steps(made, trial, count=3)
        assert len(runs) > before, path  # together again
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chain, "ran", lambda *_: None)
            other = copy.deepcopy(made)
            assert np.array_equal(steps(other, copy.deepcopy(caches), count=3)[0], found), path
        layer.set_threshold(kept)


def test_a_prompt_of_one_row_is_dense():
    made = model()
    caches = prompted(made)
    steps(made, caches, count=3)
    with phase.prompting():
        dense, counted = steps(made, caches, count=1)
    assert counted == {}
    assert not np.array_equal(dense, steps(made, caches, count=1)[0])


@pytest.mark.parametrize("lengths", [(4,), (5, 2, 9)])
def test_a_batch_is_bit_for_bit_what_it_is_block_by_block(lengths, runs):
    def results(made):
        alone = [prompted(made, length) for length in lengths]
        caches = [type(many[0]).merge(list(many)) for many in zip(*alone, strict=True)]
        with active_counts.counting() as counter:
            found = [made(mx.array([[7 + i]] * len(lengths)), cache=caches) for i in range(6)]
            mx.eval(found)
        shares = dict(named(made, counter.densities()))
        return np.array(mx.concatenate(found)), shares, [one.keys[:, :, : one._idx] for one in caches], caches

    found, shares, keys, caches = results(model())
    assert runs == [BLOCKS] * 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "ran", lambda *_: None)
        alone, counted, kept, others = results(model())
    assert np.array_equal(found, alone)
    assert shares == pytest.approx(counted)
    for mine, theirs in zip(keys, kept, strict=True):
        assert mx.array_equal(mine, theirs).item()
    assert [one.offset.tolist() for one in caches] == [one.offset.tolist() for one in others]


class Walk:
    """A pass through the blocks. meddle: called before each with its place and input, which it may change."""

    def __init__(self, made):
        self.made, self.caches = made, [KVCache() for _ in made.layers]
        for one in self.caches:
            one.update_and_fetch(mx.ones((1, 2, 3, 32)), mx.ones((1, 2, 3, 32)))

    def __call__(self, meddle=lambda i, x, walk: x, layers=None):
        x = mx.random.normal((1, 1, WIDTH), key=mx.random.key(5))
        for i, (block, cache) in enumerate(zip(layers or self.made.layers, self.caches, strict=False)):
            x = meddle(i, x, self)
            x = block(x, None, cache=cache)
        return x


def scaled(i, x, walk):
    return x * 0.5 if i else x


def added(i, x, walk):
    if i == 1:
        x += 0.25  # another value, the same object
    return x


def put(i, x, walk):
    if i == 2:
        x[..., :] = 0.125
    return x


def trimmed(i, x, walk):
    if i == 1:
        walk.caches[1].trim(1)
    return x


def joined_by(i, x, walk):
    if i == 1:
        walk.caches[2].update_and_fetch(mx.ones((1, 2, 1, 32)), mx.ones((1, 2, 1, 32)))
    return x


def threshold(i, x, walk):
    if i == 1:
        walk.made.layers[2].mlp.down_proj.set_threshold(1.0)
    return x


def rope(i, x, walk):
    if i == 0:
        walk.made.layers[1].self_attn.rope = nn.RoPE(32, traditional=True)
    return x


def once_before(i, x, walk):
    if i == 1:
        walk.made.layers[1](x, None, cache=walk.caches[1])
    return x


@pytest.mark.parametrize("first", [0, 4], ids=["from the start", "later"])
@pytest.mark.parametrize(
    "meddle", [scaled, added, put, trimmed, joined_by, threshold, rope, once_before], ids=lambda f: f.__name__
)
def test_what_comes_between_blocks_is_not_passed_over(meddle, first):
    def results(made):
        walk = Walk(made)
        found = [walk(meddle) if first <= i < 6 else walk() for i in range(9)]
        return np.array(mx.concatenate(found)), [one.offset for one in walk.caches]

    found, offsets = results(model())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "ran", lambda *_: None)
        alone, known = results(model())
    assert np.array_equal(found, alone)
    assert offsets == known


def test_one_cache_of_two_blocks(runs):
    def results(made):
        walk = Walk(made)
        walk.caches = [walk.caches[0]] * BLOCKS
        return np.array(mx.concatenate([walk() for _ in range(4)]))

    found = results(model())
    assert runs == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "ran", lambda *_: None)
        assert np.array_equal(found, results(model()))


def test_blocks_that_are_left_out_later_are_not_computed(runs):
    walk = Walk(model(blocks=4))
    for _ in range(4):
        walk()
    del runs[:]
    with active_counts.counting() as counter:
        mx.eval([walk(layers=walk.made.layers[:2]) for _ in range(4)])
    assert runs == [4, 2]  # the second step finds the first one's unfinished, the third joins two blocks
    assert len(counter.densities()) == 14


def test_blocks_that_skip_nothing_are_not_counted(runs):
    made = model(blocks=5)
    for layer in layers.zigzag_layers(made.layers[2]).values():
        layer.set_threshold(None)
    _, counted = steps(made, prompted(made), count=4)
    assert sorted({path.split(".")[2] for path in counted}) == ["0", "1", "3", "4"]
    assert set(runs) == {2}


def test_counting_does_not_copy_the_cache():
    """A tally evaluates its counts every 32 steps."""
    made = model()
    caches = prompted(made)
    room = [mx.zeros((1, 2, 20000, 32)) for _ in range(2 * BLOCKS)]
    for one in caches:
        one.keys, one.values = room.pop(), room.pop()
    with active_counts.counting():
        for i in range(70):
            mx.eval(made(mx.array([[7]]), cache=caches))
            if i == 3:
                base = mx.get_active_memory()
                mx.reset_peak_memory()
    assert mx.get_peak_memory() - base < caches[0].keys.nbytes / 2


def test_a_compiled_step_leaves_other_steps_alone():
    """Weights are tracers while it is traced: nothing can be learned from that."""
    made = model()
    compiled = mx.compile(lambda x: Walk(made)(), inputs=[made.state])
    for x in (mx.zeros((1,)), mx.ones((1,))):
        mx.eval(compiled(x))
    alone, _, _ = expected(llama)
    assert np.array_equal(steps(made, prompted(made))[0], alone)


def test_models_and_caches_are_let_go():
    made = model()
    caches = prompted(made)
    steps(made, caches, count=4)
    seen = weakref.ref(made.layers[0].__dict__[fused.BLOCK]), weakref.ref(caches[1])
    del made, caches
    gc.collect()
    assert [one() for one in seen] == [None, None]


def test_what_does_not_fit_is_refused():
    made = model()
    caches = prompted(made)
    steps(made, caches, count=3)
    run, x = chains(made)[0]._run, mx.ones((1, 1, WIDTH))
    keys, values = ([getattr(one, name) for one in caches] for name in ("keys", "values"))
    places, counted = [one.offset for one in caches], mx.zeros((7 * BLOCKS,), mx.uint32)
    for wrong in (
        (mx.ones((1, 2, WIDTH)), keys, values, places, counted),
        (x, keys, values, places, counted, ([mx.zeros((1,), mx.int32)] * BLOCKS, mx.ones((1, 3), mx.bool_))),
        (
            x,
            keys,
            values,
            places,
            counted,
            ([mx.zeros((1,))] * BLOCKS, mx.ones((1, places[0] + 1), mx.bool_)),
        ),
        (x.astype(mx.float16), keys, values, places, counted),
        (x[..., 1:], keys, values, places, counted),
        (x, keys[1:], values, places, counted),
        (x, keys, [v[:, 1:] for v in values], places, counted),
        (x, keys, values, [256] * BLOCKS, counted),
        (x, [k.astype(mx.float16) for k in keys], values, places, counted),
        (x, keys, values, places, counted[1:]),
    ):
        with pytest.raises(ValueError, match=r"\[spqt\]"):
            run(*wrong, *[None] * (6 - len(wrong)))
    assert cpu.prepare_chain([]) is None
