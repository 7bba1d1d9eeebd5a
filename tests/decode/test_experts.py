"""ZigzagSwitchLinear in mlx-lm's own SwitchGLU and in a model: masks, counts, which operations run.

Contract: dense in prompts, each row masked by its own in decode steps, as the definition (MLX's gather_mm on
dequantized weights). The bits of the CPU's operation are test_experts.py's of backends/cpu.
"""

import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_lm.generate import batch_generate, generate_step
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear

from spqt_cli.backends import select
from spqt_cli.calibrate import calibrate
from spqt_cli.convert import convert
from spqt_cli.decode import active_counts, generate, hooks, phase, session
from spqt_cli.decode.layers import linear_layers, share_inputs, zigzag_layers
from spqt_cli.decode.options import Options, Prompt, Sampling
from spqt_cli.format import layout
from tests.lib.mixture import PROJECTIONS, tiny_mixture

WIDTH, MIDDLE, EXPERTS = 96, 160, 6
NAMES = ("gate_proj", "up_proj", "down_proj")


def zigzag_glu(band: int = 64) -> SwitchGLU:
    mx.random.seed(0)
    module = SwitchGLU(WIDTH, MIDDLE, EXPERTS, bias=True)
    for name in NAMES:
        module[name].bias = mx.random.normal(module[name].bias.shape)
    hooks.install()
    entry = {"group_size": 32, "bits": 4, "mode": "zigzag", "spqt": {"band": band, "experts": EXPERTS}}
    nn.quantize(module, class_predicate=lambda _, one: entry if isinstance(one, SwitchLinear) else False)
    share_inputs(module)
    mx.eval(module.parameters())
    return module


class MaskedSwitch(nn.Module):
    def __init__(self, layer, threshold):
        super().__init__()
        outputs, inputs = layer.outputs, layer.inputs
        self.plain, self.threshold = SwitchLinear(inputs, outputs, EXPERTS), mx.array([threshold])
        self.plain.weight, self.plain.bias = layer.dequantized(), layer.bias

    def __call__(self, x, indices, sorted_indices=False):
        return self.plain(layout.mask(x, self.threshold), indices, sorted_indices=sorted_indices)


def definition(module, threshold):
    found = SwitchGLU(WIDTH, MIDDLE, EXPERTS)
    for name in NAMES:
        found[name] = MaskedSwitch(module[name], threshold)
    return found


def set_thresholds(module, threshold):
    for name in NAMES:
        module[name].set_threshold(threshold)


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [((1, 1), 2), ((1, 1), EXPERTS), ((3, 1), 2), ((1, 5), 3), ((20, 1), 4), ((1, 90), 6)],
    ids=str,
)
def test_dense_in_prompts_and_masked_in_decode_steps(rows, chosen):
    """20 tokens of 4 experts are sorted by mlx-lm; 90 of 6 are more than one operation takes."""
    module = zigzag_glu()
    set_thresholds(module, 0.5)
    x = mx.random.normal((*rows, WIDTH))
    indices = mx.argsort(mx.random.normal((*rows, EXPERTS)))[..., :chosen].astype(mx.uint32)
    with phase.decoding():
        sparse = module(x, indices)
    wanted = definition(module, 0.5)(x, indices)
    assert mx.allclose(sparse, wanted, rtol=1e-4, atol=1e-4)
    dense = definition(module, 0.0)(x, indices)
    assert mx.allclose(module(x, indices), dense, rtol=1e-4, atol=1e-4)
    assert mx.abs(wanted - dense).max() > 0.1


def test_active_channels_and_chosen_experts_are_counted():
    module, threshold = zigzag_glu(), 0.5
    set_thresholds(module, threshold)
    steps = [mx.random.normal((rows, 1, WIDTH), key=mx.random.key(rows)) for rows in (1, 1, 3)]
    indices = [mx.array([[[1, 4]]] * len(x), mx.uint32) for x in steps]
    with active_counts.counting() as counter:
        for x, chosen in zip(steps, indices, strict=True):
            with phase.decoding():
                module(x, chosen)
            module(x, chosen)  # a prompt counts nothing
    shares = {id(share.layer): share for share in counter.shares()}
    kept = np.concatenate([(np.abs(np.array(x)) >= threshold).reshape(-1, WIDTH) for x in steps])
    for name in NAMES:
        share = shares[id(module[name])]
        assert share.rows == pytest.approx(2 * (1 + 1 + 3) / 3)
        assert share.read == share.active
        if name != "down_proj":
            assert share.active == pytest.approx(kept.mean())


def test_masked_products_of_many_rows_are_counted_too():
    module = zigzag_glu()
    module.up_proj.set_threshold(0.5)
    x = mx.random.normal((200, 1, WIDTH))
    indices = mx.zeros((200, 1, 3), mx.uint32)
    with active_counts.counting() as counter, phase.decoding():
        module(x, indices)
    (share,) = counter.shares()
    assert share.active == pytest.approx((np.abs(np.array(x)) >= 0.5).mean())
    assert share.rows == 600


def test_few_indices_for_many_rows_are_many_products():
    """As deepseek_v41's groups of heads, whose indices are the same for every token."""
    layer = zigzag_glu().up_proj
    layer.set_threshold(0.5)
    x, indices = mx.random.normal((100, EXPERTS, 1, WIDTH)), mx.arange(EXPERTS)[None]
    with phase.decoding(), active_counts.counting() as counter:
        found = layer(x, indices)
    assert mx.allclose(found, MaskedSwitch(layer, 0.5)(x, indices), rtol=1e-4, atol=1e-4)
    (share,) = counter.shares()
    assert share.rows == 100 * EXPERTS


def test_gate_and_up_run_as_one_operation_and_are_prepared_once(monkeypatch):
    module, prepared, run = zigzag_glu(), [], []

    def watched(layers):
        prepared.append(len(layers))
        step = stock(layers)
        return lambda *given: run.append(len(layers)) or step(*given)

    stock = select.prepare_experts
    monkeypatch.setattr(select, "prepare_experts", watched)
    indices = mx.array([[[0, 5]]], mx.uint32)
    with phase.decoding():
        for _ in range(3):
            module(mx.random.normal((1, 1, WIDTH)), indices)
    assert prepared == [2, 1]
    assert run == [2, 1] * 3
    module.gate_proj.set_threshold(0.4)
    with phase.decoding():
        module(mx.random.normal((1, 1, WIDTH)), indices)
    assert prepared == [2, 1, 2]


def test_the_same_row_with_other_experts_is_another_product():
    module, x = zigzag_glu(), mx.random.normal((1, 1, 1, 1, WIDTH))
    with phase.decoding():
        first = module.up_proj(x, mx.array([[[0, 1]]], mx.uint32))
        other = module.gate_proj(x, mx.array([[[2, 3]]], mx.uint32))
    wanted = MaskedSwitch(module.gate_proj, 0.0)(x, mx.array([[[2, 3]]], mx.uint32))
    assert mx.allclose(other, wanted, rtol=1e-4, atol=1e-4)
    assert first.shape == (1, 1, 2, 1, MIDDLE)


def test_a_printed_layer_names_its_sizes():
    text = str(zigzag_glu().down_proj)
    assert f"input_dims={MIDDLE}, output_dims={WIDTH}" in text
    assert f"num_experts={EXPERTS}" in text


def test_mlx_lm_s_own_experts_stay_what_they_are():
    hooks.install()
    assert type(SwitchLinear(64, 64, 2).to_quantized(32, 4)).__name__ == "QuantizedSwitchLinear"


# --- in a model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("experts")
    source = tiny_mixture(base / "source")
    convert.convert(str(source), base / "model", convert.ConvertOptions(group_size=32))
    return base / "model"


@pytest.fixture
def loaded(folder):
    return session.load(folder)


def test_a_loaded_model_knows_how_many_experts_a_token_takes(loaded):
    found = zigzag_layers(loaded.model)
    assert {found[path].chosen for path in PROJECTIONS} == {2}
    one = found[PROJECTIONS[0]]
    assert one.size == 2 * one.inputs * one.outputs
    assert not set(PROJECTIONS) & linear_layers(loaded.model).keys()


def test_generation_counts_the_chosen_experts_bytes(loaded):
    layers = zigzag_layers(loaded.model)
    for layer in layers.values():
        layer.set_threshold(0.02)
    with active_counts.counting() as counter:
        tokens = mx.array(generate.encode(loaded, Prompt("pack my box")))
        steps = len([token for token, _ in generate_step(tokens, loaded.model, max_tokens=6)])
    shares = {id(share.layer): share for share in counter.shares()}
    assert steps == 6
    for path in PROJECTIONS:
        assert shares[id(layers[path])].rows == 2
        assert 0.1 < shares[id(layers[path])].active < 1
    read, dense, skipped = session.touched_bytes(loaded, counter.shares())
    packed = ("weight", "scales", "biases")
    expected = 0.0
    for path, layer in layers.items():
        part = 0.5 if path in PROJECTIONS else 1
        size = sum(layer[name].nbytes for name in packed) * part
        expected += size * (1 - shares[id(layer)].read)
    assert dense - read == pytest.approx(expected)
    assert 0 < skipped < 1


def test_texts_of_a_batch_are_those_of_each_alone(loaded):
    """Each row has its own experts, and the same bits beside others as alone."""
    for layer in zigzag_layers(loaded.model).values():
        layer.set_threshold(0.02)
    prompts = [[5, 9, 200, 31], [7, 7, 8], [99, 4, 300, 12, 45]]
    alone = [
        [int(token) for token, _ in generate_step(mx.array(prompt), loaded.model, max_tokens=6)]
        for prompt in prompts
    ]
    found = batch_generate(loaded.model, loaded.tokenizer, prompts, max_tokens=6)
    texts = [loaded.tokenizer.decode(one) for one in alone]
    assert [text.rstrip() for text in found.texts] == [text.rstrip() for text in texts]


def test_stock_backend_writes_the_same_text(loaded, monkeypatch):
    def written():
        for layer in zigzag_layers(loaded.model).values():
            layer.set_threshold(0.02)
        tokens = generate.encode(loaded, Prompt("the quick brown fox"))
        pieces = list(generate.stream(loaded, tokens, Sampling(), Options(max_tokens=5)))
        return "".join(piece for piece in pieces[:-1])

    ours = written()
    monkeypatch.setenv("SPQT_BACKEND", "stock")
    assert written() == ours


def test_a_backend_that_reads_experts_whole_says_so(folder, tmp_path, monkeypatch):
    model = shutil.copytree(folder, tmp_path / "model")
    calibrate.calibrate(
        model, calibrate.CalibrateOptions(sparsity=0.4, tokens=256, window=64), lambda *_: None
    )
    assert "experts" not in session.load(model).note
    monkeypatch.setenv("SPQT_BACKEND", "stock")
    loaded = session.load(model)
    assert "backend stock reads experts whole" in loaded.note
    assert "experts" not in session.load(model, dense=True).note
    with active_counts.counting() as counter:
        for _ in generate_step(mx.array([5, 9, 31]), loaded.model, max_tokens=3):
            pass
    layers = zigzag_layers(loaded.model)
    shares = {id(share.layer): share for share in counter.shares()}
    for path in PROJECTIONS:
        assert shares[id(layers[path])].read == 1
        assert shares[id(layers[path])].active < 1
