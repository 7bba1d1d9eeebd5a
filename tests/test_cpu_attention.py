"""Attention on the CPU extension at every width, in an order that meets what wider heads left in memory."""

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli import cpu, cpu_patch
from spqt_cli.convert import ConvertOptions, convert
from tests.conftest import tiny_checkpoint

USABLE, REASON = cpu.status()
pytestmark = [pytest.mark.skipif(not USABLE, reason=REASON), pytest.mark.usefixtures("isa")]

WIDTHS = range(256, 0, -16)  # all that the guards admit, wide before narrow
TOLERANCE = 5e-6  # float32 sums of up to 300 terms against float64


def random(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def oracle(q, k, v, causal):
    """softmax(q @ k.T / sqrt(width)) @ v in float64; row i of a causal q sees all but the last rows - 1 - i keys."""
    q, k, v = (np.array(a).astype(np.float64) for a in (q, k, v))
    shared = q.shape[1] // k.shape[1]
    scores = q @ np.repeat(k, shared, 1).swapaxes(2, 3) * q.shape[3] ** -0.5
    if causal:
        hidden = np.triu(np.ones(scores.shape[2:], bool), 1 + k.shape[2] - q.shape[2])
        scores = np.where(hidden, -np.inf, scores)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ np.repeat(v, shared, 1)


def ours(q, k, v, causal=True):
    assert cpu.attends(q, k, v)
    return np.array(cpu.attention(q, k, v, scale=q.shape[3] ** -0.5, causal=causal))


def close(found, want, tolerance=TOLERANCE):
    # row by row: an error in one must not drown in the others
    error, size = (np.linalg.norm(a, axis=-1) for a in (found - want, want))
    assert (error <= tolerance * np.maximum(size, np.sqrt(np.mean(size**2)))).all(), (error / size).max()


# rows and keys: where a block of 96 rows, a panel of 64 keys and a stretch of 128 end, and one to either side
@pytest.mark.parametrize(
    ("rows", "keys"),
    [(2, 2), (7, 63), (13, 64), (12, 65), (95, 127), (96, 128), (97, 129), (192, 193), (193, 300)]
    + [(1, keys) for keys in (1, 63, 64, 65, 127, 128, 129, 256, 257)],
)
@pytest.mark.parametrize("causal", [True, False])
def test_every_width(rows, keys, causal):
    for width in WIDTHS:
        q = random(1, 4, rows, width)
        k, v = (random(1, 2, keys + 5, width, seed=seed)[:, :, :keys] for seed in (1, 2))
        close(ours(q, k, v, causal), oracle(q, k, v, causal))


@pytest.mark.parametrize(("heads", "key_heads", "batch"), [(1, 1, 1), (9, 3, 2), (7, 1, 1), (4, 4, 3)])
def test_shared_keys(heads, key_heads, batch):
    for width in WIDTHS:
        for rows in (1, 3, 50):
            q = random(batch, heads, rows, width)
            k, v = (random(batch, key_heads, 70, width, seed=seed) for seed in (1, 2))
            close(ours(q, k, v), oracle(q, k, v, True))


def test_a_prompt_is_what_its_tokens_are_one_by_one():
    for width in WIDTHS:
        q, k, v = random(1, 6, 140, width), random(1, 2, 140, width, seed=1), random(1, 2, 140, width, seed=2)
        whole = ours(q, k, v)
        one_by_one = [ours(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1]) for i in range(0, 140, 9)]
        close(whole[:, :, ::9], np.concatenate(one_by_one, axis=2))


def test_all_widths_in_one_graph():
    """Several jobs wait for the same memory at once."""
    made = []
    for width in (*WIDTHS, *reversed(WIDTHS)):
        q, k, v = (random(1, 4, 40, width, seed=seed) for seed in range(3))
        made.append((cpu.attention(q, k, v, scale=width**-0.5, causal=True), oracle(q, k, v, True)))
    mx.eval([y for y, _ in made])
    for y, want in made:
        close(np.array(y), want)


def test_logits_of_a_model_with_heads_of_80(tmp_path):
    """Prompts and tokens after them through mlx-lm, against MLX's own attention on the same model."""
    from mlx_lm.models.cache import make_prompt_cache

    from spqt_cli import model

    sizes = {"head_dim": 80, "hidden_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}
    convert(str(tiny_checkpoint(tmp_path / "m", **sizes)), tmp_path / "out", ConvertOptions(8, 32))
    loaded = model.load(tmp_path / "out")[0]
    tokens = mx.array([np.random.default_rng(0).integers(0, 512, 150)])

    def logits():
        cache = make_prompt_cache(loaded)
        return np.concatenate([np.array(loaded(some, cache=cache)) for some in mx.split(tokens, [120, 149], 1)], 1)

    cpu_patch.install()
    found = logits()
    cpu_patch.remove()
    close(found, logits(), 1e-4)  # two layers of roundings, and a head
