"""Attention on the CPU extension at every width of heads.

Contract: `cpu.attention` and a step of `cpu.prepare_token` give softmax(q @ k.T * scale) @ v in float32, for
every width, mask and number of keys; widths come in an order that meets what wider heads left in memory.
The reference is float64. TOLERANCE: float32 roundings of either sign over 300 terms come to about
sqrt(300) * 2^-24 = 1e-6 of a row's norm; five times that leaves room for the exponentials.
"""

from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from spqt_cli.backends import cpu
from spqt_cli.convert.convert import ConvertOptions, convert
from spqt_cli.decode import hooks_cpu
from spqt_cli.decode.session import load
from tests.conftest import tiny_checkpoint

USABLE, REASON = cpu.status()
pytestmark = [pytest.mark.skipif(not USABLE, reason=REASON), pytest.mark.usefixtures("isa")]

WIDTHS = range(256, 0, -16)  # all that the guards admit, wide before narrow
TOLERANCE = 5e-6  # float32 sums of up to 300 terms against float64


def random(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def oracle(q, k, v, causal):
    """softmax(q @ k.T / sqrt(width)) @ v in float64; causal: the last row sees all keys."""
    q, k, v = (np.array(a).astype(np.float64) for a in (q, k, v))
    shared = q.shape[1] // k.shape[1]
    scores = q @ np.repeat(k, shared, 1).swapaxes(2, 3) * q.shape[3] ** -0.5
    if causal:
        hidden = np.triu(np.ones(scores.shape[2:], bool), 1 + k.shape[2] - q.shape[2])
        scores = np.where(hidden, -np.inf, scores)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ np.repeat(v, shared, 1)


@cache  # the instruction sets share them
def case(heads, rows, keys, width, causal):
    """q, k, v as a slice of a longer cache, and their oracle. heads: batch, heads, heads of keys."""
    batch, heads, key_heads = heads
    q = random(batch, heads, rows, width)
    k, v = (random(batch, key_heads, keys + 5, width, seed=seed)[:, :, :keys] for seed in (1, 2))
    return q, k, v, oracle(q, k, v, causal)


def ours(q, k, v, causal=True):
    assert cpu.attends(q, k, v)
    return np.array(cpu.attention(q, k, v, scale=q.shape[3] ** -0.5, causal=causal))


def check_every_width(heads, rows, keys, causal=True):
    for width in WIDTHS:
        q, k, v, want = case(heads, rows, keys, width, causal)
        close(ours(q, k, v, causal), want)


def close(found, want, tolerance=TOLERANCE):
    # row by row: an error in one must not drown in the others
    error, size = (np.linalg.norm(a, axis=-1) for a in (found - want, want))
    assert (error <= tolerance * np.maximum(size, np.sqrt(np.mean(size**2)))).all(), (error / size).max()


# where a block of 96 rows, a panel of 64 keys and a stretch of 128 end, and one to either side
@pytest.mark.parametrize("keys", [1, 63, 64, 65, 127, 128, 129, 256, 257])
def test_one_row(keys):
    check_every_width((1, 2, 1), 1, keys)


@pytest.mark.parametrize(
    ("rows", "keys"),
    [(2, 2), (7, 63), (13, 64), (12, 65), (95, 127), (96, 128), (97, 129), (193, 193)],
)
def test_many_rows(rows, keys):
    check_every_width((1, 2, 1), rows, keys)


@pytest.mark.parametrize(("rows", "keys"), [(5, 65), (97, 128)])
def test_rows_that_see_every_key(rows, keys):
    check_every_width((1, 2, 1), rows, keys, causal=False)


@pytest.mark.parametrize("heads", [(1, 1, 1), (2, 9, 3), (1, 7, 1), (3, 4, 4)], ids=str)
@pytest.mark.parametrize("rows", [1, 15])
def test_shared_keys(heads, rows):
    check_every_width(heads, rows, 70)


def test_a_prompt_is_what_its_tokens_are_one_by_one():
    for width in WIDTHS:
        q, k, v, _ = case((1, 2, 1), 97, 129, width, True)
        whole = ours(q, k, v)
        for row in (0, 11, 12, 95, 96):
            seen = 129 - 96 + row
            alone = ours(q[:, :, row : row + 1], k[:, :, :seen], v[:, :, :seen])
            close(whole[:, :, row : row + 1], alone)


def test_all_widths_in_one_graph():
    """Several jobs wait for the same memory at once."""
    for rows in (1, 40):
        cases = [case((1, 2, 1), rows, 40, width, True) for width in (*WIDTHS, *reversed(WIDTHS))]
        made = [cpu.attention(q, k, v, scale=q.shape[3] ** -0.5, causal=True) for q, k, v, _ in cases]
        mx.eval(made)
        for y, (*_, want) in zip(made, cases, strict=True):
            close(np.array(y), want)


@pytest.fixture
def ops():
    """Sets which operations stand behind MLX's names; they are as before in the end."""
    before = mx.fast.rms_norm
    yield lambda ours: hooks_cpu.install() if ours else hooks_cpu.remove()
    hooks_cpu.install() if before is hooks_cpu.rms_norm else hooks_cpu.remove()


def test_logits_of_a_model_with_heads_of_80(tmp_path, ops):
    """Two parts of a prompt and a token through mlx-lm, on our attention and on MLX's."""
    sizes = {"head_dim": 80, "hidden_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}
    convert(str(tiny_checkpoint(tmp_path / "m", **sizes)), tmp_path / "out", ConvertOptions(8, 32))
    loaded = load(tmp_path / "out").model
    tokens = mx.array(np.random.default_rng(0).integers(0, 512, (1, 150)))
    found = []
    for ours in (True, False):
        ops(ours)
        kept = make_prompt_cache(loaded)
        parts = [np.array(loaded(some, cache=kept)) for some in mx.split(tokens, [120, 149], axis=1)]
        found.append(np.concatenate(parts, axis=1))
    close(*found, 1e-4)  # two layers of roundings, and a head


def masked(q, k, v, mask, oldest=0):
    return cpu.attention(q, k, v, scale=q.shape[3] ** -0.5, causal=False, mask=mask, oldest=oldest)


def visible(kind: str, batch: int, keys: int) -> np.ndarray:
    """(batch, keys): runs after paddings of several lengths, or keys with holes between them."""
    if kind == "padded":
        return np.arange(keys) >= np.arange(batch)[:, None] * (keys // batch)
    seen = np.random.default_rng(3).random((batch, keys)) < 0.6
    seen[:, -1] = True
    return seen


@pytest.mark.parametrize("kind", ["padded", "holes"])
@pytest.mark.parametrize("keys", [5, 128, 300])
def test_a_masked_row_is_one_that_has_its_keys_alone(kind, keys):
    """Bit for bit, and as the definition has it."""
    q, k, v = random(4, 6, 1, 32), random(4, 2, keys, 32, seed=1), random(4, 2, keys, 32, seed=2)
    seen = visible(kind, 4, keys)
    found = masked(q, k, v, mx.array(seen)[:, None, None])
    for at in range(4):
        own = [a[at : at + 1, :, np.flatnonzero(seen[at])] for a in (np.array(k), np.array(v))]
        alone = ours(q[at : at + 1], *map(mx.array, own), causal=False)
        assert np.array_equal(found[at : at + 1], alone)
        close(alone, oracle(q[at : at + 1], *own, causal=False))


def test_one_mask_for_all_and_none_that_is_seen():
    q, k = random(3, 2, 1, 16), random(3, 2, 7, 16, seed=1)
    seen = mx.array([False, True, True, False, False, True, False])
    each = mx.broadcast_to(seen, (3, 1, 1, 7))
    assert mx.array_equal(masked(q, k, k, seen), masked(q, k, k, each)).item()
    none = each & mx.array([True, False, True])[:, None, None, None]
    found = masked(q, k, k, none)
    assert mx.array_equal(found[::2], masked(q, k, k, each)[::2]).item()
    assert not found[1].any().item()


@pytest.mark.parametrize("keys", [3, 128, 200])
@pytest.mark.parametrize("with_mask", [False, True])
def test_keys_of_a_ring_are_taken_in_the_order_of_their_tokens(keys, with_mask):
    q, k, v = random(2, 4, 1, 16), random(2, 2, keys, 16, seed=1), random(2, 2, keys, 16, seed=2)
    seen = mx.array(visible("padded", 2, keys))[:, None, None] if with_mask else None
    expected = masked(q, k, v, seen)
    for turned in (1, keys // 2, keys - 1):
        ring = [mx.roll(a, turned, axis=2) for a in (k, v)]
        mask = None if seen is None else mx.roll(seen, turned, axis=3)
        assert mx.array_equal(masked(q, *ring, mask, oldest=turned), expected).item()


def test_masks_that_do_not_fit_are_refused():
    q, k = random(2, 2, 1, 16), random(2, 2, 7, 16, seed=1)
    for mask, oldest, match in (
        (mx.ones((2, 1, 1, 7)), 0, "bool"),
        (mx.ones((2, 1, 1, 6), mx.bool_), 0, "keys"),
        (mx.ones((3, 1, 1, 7), mx.bool_), 0, "each sequence"),
        (None, 7, "oldest"),
    ):
        with pytest.raises(ValueError, match=match):
            masked(q, k, k, mask, oldest)
    with pytest.raises(ValueError, match="one row"):
        masked(random(2, 2, 3, 16), k, k, mx.ones((7,), mx.bool_))
