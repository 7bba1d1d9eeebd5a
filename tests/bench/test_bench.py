"""The model benchmark: what is compared, in which order, and what the figures are made of."""

import contextlib
import importlib

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from typer.testing import CliRunner

from spqt_cli.backends import cpu, select
from spqt_cli.backends.interface import Backend
from spqt_cli.bench import bench, model_timing, models
from spqt_cli.bench.results import ModelRow
from spqt_cli.cli.main import app
from spqt_cli.decode import active_counts, hooks_cpu, phase, profile
from spqt_cli.decode.layers import ZigzagLinear, zigzag_layers
from spqt_cli.decode.only_mlx import check_unpatched, only_mlx
from spqt_cli.errors import ResourceError, SpqtError, UsageError
from tests.conftest import tiny_config


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tiny_subject(arch: str = "llama", group_size: int = 32, **changes) -> models.Subject:
    return models.random_subject("tiny", tiny_config(arch, **changes), 4, group_size, mx.float32)


@pytest.fixture(scope="module")
def subject() -> models.Subject:
    return tiny_subject()


def runs(subject: models.Subject) -> model_timing.Runs:
    return model_timing.Runs(subject, [0.5], model_timing.hardware.Energy(), 1e9)


def rows(subject: models.Subject, test: model_timing.Test, repetitions: int = 2) -> list[ModelRow]:
    return runs(subject).run(test, repetitions, lambda *_: None)


# --- what is compared


def test_stock_layers_are_mlx_s_own(subject):
    with only_mlx():
        for module in subject.stock.modules():
            assert not isinstance(module, ZigzagLinear)
            for method in ("__call__", "as_linear"):
                owner = getattr(type(module), method, None)
                assert owner is None or owner.__module__.startswith("mlx")
    layers = [one for one in subject.stock.modules() if isinstance(one, nn.QuantizedLinear)]
    assert len(layers) == len(zigzag_layers(subject.zigzag))


def test_a_patched_stock_layer_is_refused(subject, monkeypatch):
    def fast(self, x):
        return x

    fast.__module__ = "spqt_cli.somewhere"
    with only_mlx(), monkeypatch.context() as patched:
        check_unpatched(subject.stock)
        patched.setattr(nn.QuantizedEmbedding, "as_linear", fast)
        with pytest.raises(RuntimeError, match="as_linear"):
            check_unpatched(subject.stock)


def test_the_cpu_backend_is_out_of_the_way_while_stock_runs(subject, monkeypatch):
    during = []

    def rate(model, prompt, cache, tokens):
        during.append((bool(zigzag_layers(model)), nn.QuantizedLinear.__call__.__module__))
        return 1.0

    monkeypatch.setattr(model_timing, "_decode_rate", rate)
    native = select.backend().name == "cpu"
    hooks_cpu.install()
    monkeypatch.setattr(
        select, "backend", lambda: Backend("cpu", "for this test", cpu, fused=cpu, native_float32=True)
    )
    try:
        dense_only = model_timing.Runs(subject, [], model_timing.hardware.Energy(), 1e9)
        dense_only.run(model_timing.Test("decode", 4, 0), 2, lambda *_: None)  # no model is really run
        assert nn.QuantizedLinear.__call__.__module__ == "spqt_cli.decode.hooks_cpu"
    finally:
        if not native:
            hooks_cpu.remove()
    assert {module for zigzag, module in during if not zigzag} == {"mlx.nn.layers.quantized"}
    assert {module for zigzag, module in during if zigzag} == {"spqt_cli.decode.hooks_cpu"}


def test_stock_weights_are_the_zigzag_ones_requantized_by_rows(subject):
    stock = dict(subject.stock.named_modules())
    for path, layer in zigzag_layers(subject.zigzag).items():
        other = stock[path]
        exact = layer.dequantized().astype(mx.float32)
        back = mx.dequantize(other.weight, other.scales, other.biases, other.group_size, other.bits)
        # Rounding to the nearest of 16 codes errs by half a step, and MLX snaps an edge of the range to
        # a whole code, which costs up to another half.
        step = mx.repeat(mx.abs(other.scales), other.group_size, axis=1)
        assert bool((mx.abs(back - exact) <= step * 1.01 + 1e-6).all()), path
        assert (other.bits, other.group_size) == (layer.bits, layer.group_size)


def test_inputs_in_no_whole_groups_stay_a_matrix_in_stock():
    subject = tiny_subject(group_size=64)  # down_proj has 160 inputs
    stock = dict(subject.stock.named_modules())
    path = "model.layers.0.mlp.down_proj"
    assert type(stock[path]) is nn.Linear
    assert mx.allclose(stock[path].weight, zigzag_layers(subject.zigzag)[path].dequantized())
    assert type(stock["model.layers.0.mlp.up_proj"]) is nn.QuantizedLinear


def test_both_models_agree_on_the_logits(subject):
    tokens = subject.prompt(0, 8)[None]
    ours, stock = subject.zigzag(tokens), subject.stock(tokens)
    error = mx.linalg.norm(ours - stock) / mx.linalg.norm(stock)
    # Two 4-bit roundings apart, each about 8 % of a layer's output; unrelated logits would give 1.4.
    assert error.item() < 0.6


@pytest.mark.parametrize("arch", ["qwen2", "gemma3"])
def test_other_architectures_have_a_stock_twin(arch):
    subject = tiny_subject(arch)
    tokens = subject.prompt(0, 4)[None]
    assert subject.stock(tokens).shape == subject.zigzag(tokens).shape


def test_random_weights_are_those_of_the_seed():
    first, second = tiny_subject(), tiny_subject()
    a, b = models.arrays(first.zigzag), models.arrays(second.zigzag)
    assert all(mx.array_equal(a[name], b[name]) for name in a)


def test_a_model_larger_than_memory_is_refused_before_it_is_computed():
    config = tiny_config("llama", hidden_size=1 << 16, intermediate_size=1 << 20, num_hidden_layers=64)
    model = models.random_model(config, 4, 64, mx.float32)
    with pytest.raises(ResourceError, match="GB"):
        models.check_memory(model, "huge")


# --- thresholds and caches


@pytest.mark.parametrize("depth", [0, 40])
@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_fitted_thresholds_skip_the_wanted_share_in_a_sparse_run(subject, sparsity, depth):
    cache = models.caches(subject, depth)["zigzag"]
    thresholds = subject.thresholds(sparsity, cache, 16)
    runs(subject).prepare(model_timing.Variant("sparse", "zigzag", sparsity, thresholds))
    with active_counts.counting() as counter, phase.decoding():
        for token in subject.tokens[:16]:  # those it was fitted to, one at a time
            mx.eval(subject.zigzag(mx.array([[token]]), cache=cache))
    densities = [density for _, density in counter.densities()]
    assert len(densities) == 14
    for density in densities:
        assert 1 - density == pytest.approx(sparsity, abs=0.01)  # 1,024 values a layer at least


def test_fitting_leaves_model_and_cache_alone(subject):
    cache = models.caches(subject, 5)["zigzag"]
    before = zigzag_layers(subject.zigzag)
    subject.thresholds(0.5, cache, 8)
    assert zigzag_layers(subject.zigzag) == before
    assert cache[0].offset == 5


@pytest.mark.parametrize("arch", ["llama", "gemma3"])  # gemma3's sliding cache can't be trimmed once full
@pytest.mark.parametrize("test", ["prompt", "decode"])
def test_a_sample_leaves_the_cache_as_it_was(arch, test):
    subject = tiny_subject(arch)
    one = runs(subject)
    cache = models.caches(subject, 80)["zigzag"]
    before = [np.array(entry.state[0]) for entry in cache]
    offsets = [entry.offset for entry in cache]
    one.sample(
        model_timing.Test(test, 6, 80),
        model_timing.Variant("zigzag dense", "zigzag", 0.0),
        cache,
        model_timing.Trial(),
    )
    assert [entry.offset for entry in cache] == offsets
    for entry, old in zip(cache, before, strict=True):
        held = min(80, old.shape[2])
        assert np.array_equal(np.array(entry.state[0])[..., :held, :], old[..., :held, :])


# --- order and figures


def test_variants_take_turns(subject, monkeypatch):
    order = []

    def rate(model, prompt, cache, tokens):
        thresholds = [layer.threshold for layer in zigzag_layers(model).values()]
        skips = bool(thresholds) and thresholds[0] is not None
        order.append("sparse" if skips else "zigzag" if thresholds else "stock")
        return float(len(order))

    monkeypatch.setattr(model_timing, "_decode_rate", rate)
    found = rows(subject, model_timing.Test("decode", 4, 0), 3)
    assert order == ["stock", "zigzag", "sparse"] * 4  # the first round warms up
    assert [row.rate.samples for row in found] == [[4, 7, 10], [5, 8, 11], [6, 9, 12]]
    assert found[1].speedup.samples == pytest.approx([5 / 4, 8 / 7, 11 / 10])


def test_a_row_tells_what_was_really_skipped_and_read(subject):
    stock, dense, sparse = rows(subject, model_timing.Test("decode", 12, 3))
    assert (stock.test, stock.depth) == ("tg12", 3)
    assert (stock.variant, dense.variant, sparse.variant) == ("stock", "zigzag dense", "sparse 50%")
    assert stock.skipped is None
    assert dense.skipped == 0
    assert sparse.skipped == pytest.approx(0.5, abs=0.1)  # other tokens than those it was fitted to
    layers = zigzag_layers(subject.zigzag).values()
    zigzag = sum(one.weight.nbytes + one.scales.nbytes + one.biases.nbytes for one in layers)
    assert dense.weight_bytes - sparse.weight_bytes == pytest.approx(
        zigzag * sparse.skipped, abs=4 * 14
    )  # thresholds are read too
    everything = sum(array.nbytes for array in models.arrays(subject.stock).values())
    assert stock.weight_bytes == everything  # a tied model: the embedding is the head
    assert sparse.bandwidth == pytest.approx(sparse.weight_bytes * sparse.rate.median)
    assert sparse.copy_share == pytest.approx(sparse.bandwidth / 1e9)


def test_prompts_have_no_sparse_variant(subject):
    found = rows(subject, model_timing.Test("prompt", 6, 0))
    assert [(row.test, row.variant) for row in found] == [("pp6", "stock"), ("pp6", "zigzag dense")]
    assert all(row.skipped is None and row.weight_bytes is None for row in found)


def test_a_profile_adds_rows_that_follow_it(subject):
    choices = {unit.key: profile.Choice(0.0, profile.ROWS) for unit in profile.units(subject.zigzag)}
    profile.write(choices, {})
    one = runs(subject)
    found = rows(subject, model_timing.Test("decode", 4, 0))
    assert [row.variant for row in found][3:] == ["zigzag dense, profile", "sparse 50%, profile"]
    model = one.prepare(one.profiled(model_timing.Variant("sparse 50%", "zigzag", 0.5)))
    assert not zigzag_layers(model)
    assert len(zigzag_layers(one.prepare(model_timing.Variant("zigzag dense", "zigzag", 0.0)))) == 14


def test_decode_rate_counts_what_lies_between_the_tokens(monkeypatch):
    times = iter([0.0, 10.0, 11.0, 12.0, 13.0])  # two warm tokens, then one a second
    monkeypatch.setattr(model_timing.time, "perf_counter", lambda: next(times))
    module = importlib.import_module("mlx_lm.generate")
    monkeypatch.setattr(module, "generate_step", lambda *a, max_tokens, **kw: range(max_tokens))
    assert model_timing._decode_rate(None, None, [], 5) == 1.0


def test_a_converted_model_is_measured_with_its_own_thresholds(calibrated):
    options = bench.Options(
        model=str(calibrated), sparsities=[0.4], prompt_tokens=[4, 3], generation_tokens=4, repetitions=2
    )
    report = bench.run(options)
    assert [row.test for row in report.rows] == ["pp4"] * 2 + ["pp3"] * 2 + ["tg4"] * 3
    assert report.rows[-1].skipped == pytest.approx(0.4, abs=0.15)
    assert report.settings["calibrated"] == 0.4
    assert {"device", "mlx", "mlx_lm", "spqt", "commit", "copy_gb_per_s"} <= set(report.machine)


def test_a_model_without_thresholds_is_refused(converted):
    with pytest.raises(SpqtError, match="no thresholds"):
        bench.run(bench.Options(model=str(converted)))


# --- options


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": "a", "shape": "llama-3-8b"},
        {"model": "a", "blocks": 2},
        {"shape": "llama-3-8b", "repetitions": 1},
        {"shape": "llama-3-8b", "generation_tokens": 1},
        {"shape": "llama-3-8b", "prompt_tokens": [8, -1]},
        {"shape": "llama-3-8b", "depths": [0, -1]},
        {"shape": "llama-3-8b", "sparsities": [1.0]},
        {"shape": "llama-3-8b", "dtype": "int8"},
        {"shape": "llama-3-8b", "bits": 7},
        {"shape": "llama-3-8b", "group_size": 48},
    ],
)
def test_options_that_make_no_sense(changes):
    with pytest.raises(UsageError):
        bench.Options(**changes).complete()


@pytest.mark.parametrize(
    "arguments",
    [["--format", "xml", "--shape", "llama-3-8b"], ["--write", "--shape", "llama-3-8b"],
     ["--shape", "llama-3-8b", "--sparsity", "0.1,x"], ["--shape", "llama-3-8b", "--depth", "inf"]],
)  # fmt: skip
def test_flags_that_make_no_sense(arguments):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert isinstance(result.exception, UsageError)


def test_evaluated_arrays_are_what_was_asked_for(monkeypatch):
    """Copies in large pages, where there are such: the same bits in other arrays."""
    asked = []

    @contextlib.contextmanager
    def in_large_pages(size):
        asked.append(size)
        yield

    monkeypatch.setattr(models.heap, "in_large_pages", in_large_pages)
    mx.random.seed(1)
    model = models.random_model(tiny_config("llama"), 4, 32, mx.float16)
    before = {name: np.array(array.view(mx.uint8)) for name, array in models.arrays(model).items()}
    models.evaluate(model)
    after = models.arrays(model)
    assert before.keys() == after.keys()
    assert asked == [sum(array.nbytes for array in after.values())]
    for name, array in after.items():
        assert np.array_equal(np.array(array.view(mx.uint8)), before[name])
