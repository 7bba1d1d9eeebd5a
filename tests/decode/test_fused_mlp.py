"""Gated feed-forward modules as one call: equal to their own code."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from spqt_cli.backends import problems, select
from spqt_cli.backends.gpu import backend as gpu
from spqt_cli.backends.gpu import first_use, kernel_text, plans, weights
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.decode import active_counts, fused, phase
from spqt_cli.decode.layers import ZigzagLinear, share_input
from tests.backends.gpu.test_first_use import fresh_trust, run_emulated
from tests.backends.gpu.test_kernels import CUTS, emulated, kinds, use
from tests.lib.backends import EMULATED

__all__ = ["emulated", "fresh_trust"]  # fixtures
pytestmark = pytest.mark.usefixtures("decode_steps")


class Plain(nn.Module):
    def __call__(self, x):
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


def layer(outputs, inputs, seed, bias):
    mx.random.seed(seed)
    linear = nn.Linear(inputs, outputs, bias=bias)
    linear.weight = linear.weight * 4
    made = ZigzagLinear.from_linear(linear.update(linear.parameters()), 64, 4)
    made.set_threshold(0.4)
    mx.eval(made.parameters())
    return made


def module(bias=False):
    made = Plain()
    made.gate_proj, made.up_proj = layer(704, 301, 1, bias), layer(704, 301, 2, bias)
    made.down_proj = layer(96, 704, 3, bias)
    share_input([made.gate_proj, made.up_proj])
    return made


@pytest.fixture
def on_emulator(emulated, monkeypatch):
    use(monkeypatch, CUTS["wide"])
    monkeypatch.setattr(select, "backend", lambda: EMULATED)
    return emulated


X = mx.random.normal((1, 1, 301), key=mx.random.key(5))


@pytest.mark.parametrize("bias", [False, True])
def test_one_call_gives_what_the_module_gives(on_emulator, bias):
    made = module(bias)
    with active_counts.counting() as apart:
        expected = made(X)
    on_emulator.clear()
    fused.install_mlp(made)
    assert isinstance(made, Plain)
    with active_counts.counting() as together:
        found = made(X)
    assert kinds(on_emulator) == ["gemv", "reduce", "count"] * 2
    # float32 sums of 704 terms in two orders, after silu: 704 * 2^-24 of the largest term, times a few.
    assert mx.allclose(found, expected, rtol=1e-4, atol=2e-4).item()
    assert {id(one): share for one, share in together.densities()} == {
        id(one): share for one, share in apart.densities()
    }


def test_counts_go_on_from_step_to_step(on_emulator):
    made = module()
    fused.install_mlp(made)
    with active_counts.counting() as counter:
        made(X)
        made(X * 0)
    shares = {id(one): share for one, share in counter.densities()}
    one_step = 1 - (mx.abs(X) < 0.4).astype(mx.float32).mean().item()
    assert shares[id(made.gate_proj)] == pytest.approx(one_step / 2)


def test_fault_47_a_prompt_of_one_row_is_dense(on_emulator):
    made = module()
    fused.install_mlp(made)
    sparse = made(X)  # prepared for decode steps
    with phase.prompting(), active_counts.counting() as counter:
        found = made(X)
    assert counter.shares() == []
    for one in (made.gate_proj, made.up_proj, made.down_proj):
        one.set_threshold(0.0)  # skips nothing, by the kernels that are built already
    expected = made(X)
    # float32 sums of 704 terms in two orders, after silu: 704 * 2^-24 of the largest term, times a few.
    assert mx.allclose(found, expected, rtol=1e-4, atol=2e-4).item()
    assert not mx.allclose(sparse, expected, rtol=1e-2, atol=1e-2).item()


def test_new_thresholds_and_other_layers_are_seen(on_emulator):
    made = module()
    fused.install_mlp(made)
    before = np.array(made(X))
    made.up_proj.set_threshold(1.0)
    assert not np.allclose(np.array(made(X)), before, atol=1e-3)
    made.up_proj.set_threshold(0.4)
    assert np.allclose(np.array(made(X)), before, atol=1e-3)
    made.down_proj = nn.QuantizedLinear.from_linear(nn.Linear(704, 96, bias=False), 64, 4)  # by a profile
    assert made(X).shape == (1, 1, 96)


def test_a_watched_layer_is_called(on_emulator):
    class Watched(nn.Module):
        def __call__(self, x):
            return mx.zeros((1, 1, 704))

    made = module()
    fused.install_mlp(made)
    made(X)
    made.gate_proj = Watched()  # silu(0) = 0
    assert not made(X).any().item()


def test_many_rows_take_the_module_s_own_way(on_emulator):
    made = module()
    x = mx.random.normal((1, 3, 301), key=mx.random.key(6))
    expected = made(x)
    fused.install_mlp(made)
    assert mx.array_equal(made(x), expected).item()
    assert on_emulator == []


def test_unequal_layers_and_single_launches_are_left_alone(on_emulator, monkeypatch):
    made = module()
    assert gpu.prepare_gated(X, [made.gate_proj, made.down_proj], made.down_proj) is None
    use(monkeypatch, CUTS["narrow"])  # one stripe: nothing is added up that could carry silu
    weights.kept(made.gate_proj).forget()
    assert gpu.prepare_gated(X, [made.gate_proj, made.up_proj], made.down_proj) is None


def test_one_stripe_is_no_fault_of_the_kernels(monkeypatch, fresh_trust):
    """Small layers have nothing to add up: what would carry silu or a sum is neither tried nor distrusted."""
    monkeypatch.setattr(launching, "run", run_emulated)
    use(monkeypatch, CUTS["narrow"])
    some, x = problems.matrices(problems.Case((128, 128), 301)), problems.vector(problems.Case((128,), 301))
    assert gpu.prepare_gated(x, some, some[0]) is None
    assert plans.of_row(x, some[:1], launching.Form(then="residual")).gemv is None
    assert first_use.refused() == []


@pytest.mark.parametrize("wrong", [False, True])
def test_the_first_use_check_judges_the_gated_reduction(monkeypatch, fresh_trust, capfd, wrong):
    real = kernel_text.body
    if wrong:
        monkeypatch.setattr(
            kernel_text, "body", lambda name: real(name).replace("1.0f + exp(", "2.0f + exp(")
        )
    monkeypatch.setattr(launching, "run", run_emulated)
    use(monkeypatch, CUTS["wide"])
    some = problems.matrices(problems.Case((128, 128), 301))
    x = problems.vector(problems.Case((128, 128), 301))
    assert (gpu.prepare_gated(x, some, some[0]) is None) is wrong
    assert bool(first_use.refused()) is wrong
    assert ("silu(gate) * up is off" in capfd.readouterr().err) is wrong
