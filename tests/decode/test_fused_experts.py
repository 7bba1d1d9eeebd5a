"""Blocks with a mixture of experts: fused up to them; then their own code, on a GPU traced or by kernels.

Contract: what the block's own code gives, and its counts.
"""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import mixtral, olmoe, qwen3_moe
from mlx_lm.models.cache import KVCache
from mlx_lm.models.switch_layers import SwitchLinear

from spqt_cli.backends import cpu, interface, select, stock
from spqt_cli.decode import active_counts, fused, hooks, layers, phase, recognize
from spqt_cli.decode.mixture_gpu import TracedMixture
from tests.backends.gpu.test_kernels import emulated, kinds
from tests.conftest import layer_settings
from tests.decode.test_fused_block import WIDTH, Doubled, block, steps, striped, token
from tests.decode.test_fused_mlp import on_emulator
from tests.lib.backends import EMULATED

__all__ = ["emulated", "on_emulator", "striped"]  # fixtures
pytestmark = pytest.mark.usefixtures("decode_steps")
USABLE, REASON = cpu.status()
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96,
    "intermediate_size": 96, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
}  # fmt: skip
MODELS = [mixtral, olmoe, qwen3_moe]


def mixture(model):
    """A block of random Zigzag layers and experts that skip some channels."""
    mx.random.seed(4)
    hooks.install()
    args = model.ModelArgs.from_dict(layer_settings(hidden_size=WIDTH, head_dim=32, **EXPERTS))
    made = model.Model(args).layers[0]
    own = recognize.parts(made)[3]
    entry = {"group_size": 32, "bits": 4, "mode": "zigzag", "spqt": {"band": 96, "experts": 4}}
    plain = {"group_size": 64, "bits": 4, "mode": "zigzag"}

    def kind(path, one):
        if isinstance(one, SwitchLinear):
            return entry
        return plain if "self_attn" in path and isinstance(one, nn.Linear) else False

    nn.quantize(made, class_predicate=kind)
    layers.share_inputs(made)
    for path, layer in layers.zigzag_layers(made).items():
        layer.set_threshold(0.3 if "self_attn" in path else 0.05)
    made.post_attention_layernorm.weight = mx.random.uniform(0.5, 1.5, (WIDTH,))
    made[own].gate.weight = made[own].gate.weight * 8  # no ties, which another order of sums would decide
    mx.eval(made.parameters())
    return made


def installed(made):
    fused.install_block(made)
    assert fused.BLOCK in made.__dict__
    return made


def compared(model):
    """Outputs and counts of a few steps by a block's own code, then fused."""
    expected, shares = steps(mixture(model))
    made = installed(mixture(model))
    made(token(4), None, cache=KVCache())  # on a GPU the first step is held against the block's own way
    found, counted = steps(made)
    assert made._fused_block.reason == ""
    # float32 sums in other orders, no more than a few hundred roundings of 2^-24
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert len(counted) == len(shares) == 7
    assert sorted(counted.values()) == pytest.approx(sorted(shares.values()), abs=1e-6)
    assert min(counted.values()) < 0.99
    return made


@pytest.mark.parametrize("model", MODELS)
def test_steps_on_a_gpu_are_the_block_s_own(striped, model):
    made = compared(model)
    assert made._fused_block._traced.reason == made._fused_block._mixture.reason == ""
    assert not made._fused_block._mixture.by_kernels  # there are but four experts
    striped.clear()
    made(token(8), None, cache=KVCache())  # nobody counts
    assert kinds(striped)[:4] == ["gemv", "reduce"] * 2  # q/k/v, o; then the experts


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_a_router_and_experts_alone_run_by_kernels(striped, monkeypatch, model, normalized):
    more = {"num_experts": 9, "num_local_experts": 9, "num_experts_per_tok": 3, "norm_topk_prob": normalized}
    monkeypatch.setitem(globals(), "EXPERTS", EXPERTS | more)
    made = compared(model)
    mixed = made._fused_block._mixture
    assert mixed.by_kernels
    found = recognize.mixture(mixed._module)
    assert (found.chosen, found.of_all) == (3, not normalized and model is not mixtral)
    striped.clear()
    made(token(8), None, cache=KVCache())
    assert kinds(striped) == [*["gemv", "reduce"] * 2, "choose", "experts", "experts", "add"]


def test_kernels_that_give_something_else_are_not_taken(traced, monkeypatch):
    def prepare(x, wanted):
        def step(h, normed, counted):
            return h + 0.8 * traced(normed), counted

        return step

    monkeypatch.setattr(select, "prepare_mixture", prepare)
    h = 1000 * token(5)  # of which the mixture is a thousandth
    assert np.allclose(np.array(traced.traced(h, token(6))), np.array(h + traced(token(6))), rtol=1e-5)
    assert (traced.traced.reason, traced.traced.by_kernels) == ("", False)
    traced.traced = TracedMixture(traced)
    monkeypatch.setattr(select, "prepare_mixture", lambda *_: 1 / 0)
    assert traced.traced(h, token(6)) is not None
    assert (traced.traced.reason, traced.traced.by_kernels) == ("", False)


class Weighed(qwen3_moe.Qwen3MoeSparseMoeBlock):
    """Softmax and choice in the usual order, from numbers that a subclass changes."""

    def __call__(self, x):
        gates = mx.softmax(self.numbers(x), axis=-1)
        chosen = mx.argpartition(-gates, kth=1, axis=-1)[..., :2]
        weights = mx.take_along_axis(gates, chosen, axis=-1)
        return (self.switch_mlp(x, chosen) * weights[..., None]).sum(axis=-2)

    def numbers(self, x):
        return self.gate(x)


class Clipped(Weighed):
    def numbers(self, x):
        return mx.clip(self.gate(x), -10, 10)


class OfTwice(Weighed):
    def numbers(self, x):
        return self.gate(2 * x)


class Grouped(Weighed):
    """Chooses among the experts of the better of two groups."""

    def numbers(self, x):
        found = mx.unflatten(self.gate(x), -1, (2, -1))
        worse = found.max(axis=-1, keepdims=True) < found.max(axis=(-2, -1), keepdims=True)
        return mx.flatten(mx.where(worse, -mx.inf, found), -2, -1)


class Sigmoid(qwen3_moe.Qwen3MoeSparseMoeBlock):
    """Weighs its experts otherwise."""

    def __call__(self, x):
        gates = mx.sigmoid(self.gate(x))
        chosen = mx.argpartition(-gates, kth=1, axis=-1)[..., :2]
        weights = mx.take_along_axis(gates, chosen, axis=-1)
        return (self.switch_mlp(x, chosen) * weights[..., None]).sum(axis=-2)


def test_which_mixtures_kernels_know():
    made = mixture(qwen3_moe).mlp
    assert recognize.mixture(made)[3:] == (2, False)
    made.__class__ = Weighed
    assert recognize.mixture(made)[3:] == (2, True)
    for kind in (Clipped, OfTwice, Grouped, Sigmoid):
        made.__class__ = kind
        assert recognize.mixture(made) is None
    made = mixture(mixtral).block_sparse_moe
    assert recognize.mixture(made)[3:] == (2, False)
    made.shared_expert = nn.Linear(8, 8)
    assert recognize.mixture(made) is None
    made = mixture(olmoe).mlp
    made.switch_mlp.activation = nn.ReLU()
    assert recognize.mixture(made) is None


def own_code(mixed, monkeypatch):
    """The calls of a mixture that its own code answers from now on, with rows as wide as its own."""
    calls, kind = [], type(mixed)
    own = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, x: (calls.append(x.shape[-1]), own(self, x))[1])
    return calls


def answers(made, seed=5):
    """h + mixture(normed) by tracing, or None; the counts by layer."""
    with active_counts.counting() as counter:
        found = made.traced(token(seed), token(seed + 1))
    return found, {id(share.layer): (share.active, share.rows, share.read) for share in counter.shares()}


@pytest.fixture
def traced(monkeypatch):
    """A mixture traced by MLX itself, which the emulator can't have; its products are MLX's."""
    monkeypatch.setattr(select, "backend", lambda: stock.found("a test"))
    made = mixture(qwen3_moe).mlp
    made.traced = TracedMixture(made)
    return made


def test_a_mixture_s_code_runs_while_it_is_traced_and_not_again(traced, monkeypatch):
    with active_counts.counting() as counter:
        expected = token(5) + traced(token(6))
    shares = {id(share.layer): (share.active, share.rows, share.read) for share in counter.shares()}
    assert len(shares) == 3
    calls = own_code(traced, monkeypatch)
    found, counted = answers(traced)
    assert traced.traced.reason == ""
    assert calls.count(WIDTH) == 3  # held against itself; traced without counts; traced with them
    assert np.allclose(np.array(found), np.array(expected), rtol=1e-5, atol=1e-5)
    assert counted == shares
    found, counted = answers(traced)
    assert np.allclose(np.array(found), np.array(expected), rtol=1e-5, atol=1e-5)
    assert counted == shares
    traced.traced(token(7), token(8))
    assert calls.count(WIDTH) == 3


def test_only_steps_of_one_token_are_traced(traced):
    rows = mx.concatenate([token(5), token(6)])
    assert traced.traced(rows, rows) is None
    with phase.prompting():
        assert traced.traced(token(5), token(6)) is None
    answers = []
    mx.eval(mx.compile(lambda x: (answers.append(traced.traced(x, x)), x)[1])(token(5)))
    assert answers == [None]
    assert traced.traced.reason is None


def test_counts_of_some_steps_and_none_of_others(traced):
    with active_counts.counting(every=3) as counter:
        for seed in range(7):
            traced.traced(token(seed), token(seed))
    assert [share.rows for share in counter.shares()] == [2, 2, 2]
    assert [tally.steps for tally in counter._tallies.values()] == [3] * len(counter._tallies)


class Watched(qwen3_moe.Qwen3MoeSparseMoeBlock):
    """A subclass from elsewhere."""


class OfTheHost(qwen3_moe.Qwen3MoeSparseMoeBlock):
    """Its choice is made in Python, which a trace can't see."""

    def __call__(self, x):
        return super().__call__(x) if mx.sum(x).item() > -1e9 else x


def test_mixtures_that_are_not_traced(traced, monkeypatch):
    traced.__class__ = Watched
    assert traced.traced(token(5), token(6)) is None
    assert traced.traced.reason == "its Watched may watch its calls"
    monkeypatch.setattr(OfTheHost, "__module__", "mlx_lm.models.elsewhere")
    traced.__class__ = OfTheHost
    traced.traced = TracedMixture(traced)
    assert traced.traced(token(5), token(6)) is None
    assert "can't be traced" in traced.traced.reason
    assert not traced.traced.by_kernels


def test_what_changes_in_a_mixture_is_seen(striped):
    made = installed(mixture(qwen3_moe))
    made(token(4), None, cache=KVCache())

    def answer():
        before = made._fused_block._mixture
        return np.array(made(token(5), None, cache=KVCache())), made._fused_block._mixture is before

    first, same = answer()
    assert same
    made.mlp.switch_mlp.down_proj.set_threshold(0.5)
    sparser, same = answer()
    assert not same
    assert not np.allclose(first, sparser)
    made.mlp.top_k = 1
    fewer, same = answer()
    assert not same
    assert not np.allclose(fewer, sparser)
    made.mlp.switch_mlp.activation.limit = 7.0  # a setting of a part, as some activations have one
    made.mlp.gate.weight = made.mlp.gate.weight * 1
    assert not answer()[1]
    made.mlp.switch_mlp.activation.limit = 1.0
    assert not answer()[1]
    made.mlp.gate.weight = made.mlp.gate.weight[::-1]
    others, same = answer()
    assert not same
    assert not np.allclose(fewer, others)
    assert answer()[1]


@pytest.mark.skipif(not USABLE, reason=REASON)
@pytest.mark.parametrize("model", MODELS)
def test_steps_on_a_cpu_are_the_block_s_own(model, tmp_path):
    made = compared(model)
    path = tmp_path / "graph.dot"
    mx.export_to_dot(str(path), made(token(5), None, cache=KVCache()))
    text = path.read_text()
    assert (text.count("SpqtHead"), text.count("SpqtMiddle")) == (1, 1)
    assert "SpqtSparseGemv" not in text


@pytest.mark.skipif(not USABLE, reason=REASON)
def test_rows_of_a_batch_are_those_alone():
    made = installed(mixture(mixtral))
    alone = [made(token(seed), None, cache=None) for seed in (5, 6, 7)]
    found = made(mx.concatenate([token(seed) for seed in (5, 6, 7)]), None, cache=None)
    assert made._fused_block.reason == ""
    assert mx.array_equal(found, mx.concatenate(alone)).item()


@pytest.mark.skipif(not USABLE, reason=REASON)
def test_a_prompt_of_one_row_is_dense_and_experts_are_counted_once():
    made = installed(mixture(mixtral))
    sparse, _ = steps(made)
    with phase.prompting():
        prompt, counted = steps(made)
    assert counted == {}
    assert not np.allclose(prompt, sparse, rtol=1e-2, atol=1e-2)
    with active_counts.counting() as counter:
        made(token(5), None, cache=KVCache())
    rows = {id(share.layer): share.rows for share in counter.shares()}
    expected = {path: 2 if "switch_mlp" in path else 1 for path in layers.zigzag_layers(made)}
    assert {path: rows[id(layer)] for path, layer in layers.zigzag_layers(made).items()} == expected


@pytest.mark.skipif(not USABLE, reason=REASON)
def test_the_middle_bit_for_bit_and_what_does_not_fit():
    made = block()
    out = made.self_attn.o_proj
    norm = interface.Norm(made.post_attention_layernorm["weight"], 1e-5)
    attended, x = token(6), token(5)
    (h, normed), (count,) = cpu.prepare_middle(x, interface.Middle(out, norm))(attended, x, [None])
    (product,), active = cpu.sparse_gemv(attended, [out])
    assert mx.array_equal(h, product + x).item()
    assert mx.array_equal(normed, cpu.rms_norm(h, norm.weight, norm.eps)).item()
    assert count.item() == active.item() < out.inputs
    step = cpu.prepare_middle(x, interface.Middle(out, norm))
    assert step(attended, x, [mx.array([7], mx.uint32)])[1][0].item() == active.item() + 7
    half = x.astype(mx.float16)
    assert cpu.prepare_middle(half, interface.Middle(out, norm)) is None
    with pytest.raises(ValueError, match="one count"):
        step(attended, x, [None] * 3)
    with pytest.raises(ValueError, match="as many rows"):
        step(mx.zeros((2, 192)), x, [None])


class Scaled(mixtral.MixtralDecoderLayer):
    def __call__(self, x, mask=None, cache=None):
        return super().__call__(x, mask, cache) * 2


def test_only_blocks_of_this_form_are_taken(monkeypatch):
    made = mixture(mixtral)
    assert recognize.why_not(made, EMULATED) == ""
    assert list(recognize.formed(made)) == [".self_attn"]
    made.__class__ = Scaled
    assert "in another way" in recognize.form(made)
    monkeypatch.setattr(fused.select, "backend", lambda: EMULATED)
    stack = nn.Module()
    stack.layers = [mixture(olmoe), mixture(qwen3_moe), block(kind=Doubled)]
    found = fused.report(stack)
    assert (found.blocks, found.fused, found.experts) == (3, 2, 0)
    fused.install_block(stack.layers[1])
    step = stack.layers[1]._fused_block
    step.reason, step._mixture = "", TracedMixture(stack.layers[1].mlp)
    step._mixture.reason = "its Watched may watch its calls"
    assert (
        fused.report(stack)
        .line()
        .endswith("; 1 by their mixture's own code: its Watched may watch its calls")
    )
    monkeypatch.setattr(fused.select, "backend", lambda: replace(EMULATED, traces=False))
    found = fused.report(stack)
    assert (found.blocks, found.fused, found.experts) == (3, 2, 2)
    assert "; 2 up to their experts" in found.line()
