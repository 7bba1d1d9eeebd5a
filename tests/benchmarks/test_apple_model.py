"""The paper model of Apple GPUs: its arithmetic, its fit, and memory lines against the emulator."""

import json
import re
import sys

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.backends.gpu import backend as gpu
from spqt_cli.backends.gpu import geometry
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.bench import projections
from spqt_cli.decode.layers import ZigzagLinear, nn
from spqt_cli.format import layout
from tests import ROOT
from tests.metal import count_instructions

apple_model = pytest.importorskip(
    "benchmarks.apple_model", reason="benchmarks/ is not part of a source archive"
)


@pytest.fixture(scope="module")
def found():
    return apple_model.fit()


def test_bytes_of_a_matrix_are_those_that_mlx_packs():
    packed = mx.quantize(mx.zeros((128, 256), mx.float16), group_size=64, bits=4)
    assert apple_model.matrix_bytes(128, 256) == sum(array.nbytes for array in packed)


def test_a_fit_finds_the_numbers_that_made_the_table(monkeypatch):
    """A table computed from known numbers gives them back."""
    made = {}
    for outputs, inputs in apple_model.PUBLIC:
        size = apple_model.matrix_bytes(outputs, inputs)
        speed = 400.0 if size <= apple_model.CACHED_MB * 1e6 else 0.8 * 273.1
        made[outputs, inputs] = (7.0 + size / speed / 1e3, 0, 0)
    monkeypatch.setattr(apple_model, "PUBLIC", made)
    fit = apple_model.fit()
    assert fit.launch_us == pytest.approx(7)
    assert fit.share == pytest.approx(0.8)
    assert fit.cached_gb_per_s == pytest.approx(400)


def test_the_fit_meets_the_public_table_as_the_docs_say(found):
    assert apple_model.rms(apple_model.public_errors(found, None)) < 0.03
    assert apple_model.best_line(found) == 64
    large = apple_model.public_errors(found, 64, apple_model.CACHED_MB * 1e6)
    assert len(large) == 8
    assert apple_model.rms(large) < 0.1


def test_errors_are_predicted_over_measured(monkeypatch, found):
    monkeypatch.setattr(apple_model, "PUBLIC", {(8192, 8192): (1e9, 1e9, 1e9)})
    assert apple_model.public_errors(found, None) == [pytest.approx(-1, abs=1e-5)]
    assert len(apple_model.public_errors(found, 64)) == 2


def test_skipping_is_never_predicted_to_read_more(found):
    chip = apple_model.CHIPS["M1"]
    times = [
        apple_model.predict(chip, found, [(4096, 4096)], density, 64).memory_us
        for density in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
    ]
    assert times == sorted(times)
    assert times[0] == 0
    assert times[-1] == pytest.approx(apple_model.matrix_bytes(4096, 4096) / (found.share * 68.3e3))


def test_a_call_counts_its_launches(found):
    chip = apple_model.CHIPS["M4 Pro"]
    three = [(4096, 4096), (1024, 4096), (1024, 4096)]
    assert apple_model.predict(chip, found, three, None, 64).launch_us == 3 * found.launch_us
    assert apple_model.predict(chip, found, three, 0.5, 64).launch_us == 2 * found.launch_us


@pytest.mark.parametrize(("decode", "work"), [(geometry.HALVES, "OURS"), (geometry.CONVERT, "CONVERTED")])
def test_the_work_of_our_kernel_is_what_is_counted(clang, decode, work):
    """Two digits, as metal/README.md has them; conversions and shifts are the slow ones."""
    text = count_instructions.ir(4, decode, clang)
    loop = count_instructions.inner_loop(text, "@_Z3fmafff(", "threadgroup_barrier")
    loop = count_instructions.halves_moved(loop)
    counts = count_instructions.ir_counts(text)
    each = count_instructions.weights(counts)
    slow = len(re.findall(r"= (?:lshr|shl|ashr|uitofp) ", loop)) / each
    found = getattr(apple_model, work)
    assert found.slow == pytest.approx(slow, abs=0.005)
    assert found.plain + found.slow == pytest.approx(count_instructions.everything(counts), abs=0.01)


def test_what_is_left_open_holds_the_prediction(found):
    for name in ("M1", "M4 Max"):
        chip, sizes = apple_model.CHIPS[name], [(14336, 4096)] * 2
        least, most = apple_model.span(chip, found, sizes, 0.5)
        assert least < apple_model.predict(chip, found, sizes, 0.5, 64).us < most


def test_a_peer_with_narrow_chunks_reads_more(found):
    chip, sizes = apple_model.CHIPS["M4 Pro"], [(4096, 4096)]
    ours = apple_model.predict(chip, found, sizes, 0.5, 64)
    other = apple_model.predict(chip, found, sizes, 0.5, 64, apple_model.MLX_SPQT)
    assert other.launch_us == found.launch_us
    assert other.memory_us > 1.3 * ours.memory_us
    assert apple_model.PEERS.cycles(side_by_side=True) == 4.0


def test_arithmetic_can_be_the_limit():
    assert apple_model.Prediction(1, 2, 5).us == 6


def test_units_of_a_block_hold_all_its_weights():
    sizes = [size for unit in apple_model.units("llama-3-8b") for size in unit]
    # 32 blocks of llama-3-8b hold 6,979,321,856 weights in their projections: 8,030,261,248 less two
    # matrices of 128,256 x 4,096 and 65 norms of 4,096.
    assert 32 * sum(outputs * inputs for outputs, inputs in sizes) == 6_979_321_856


def test_every_prediction_is_labelled():
    text = apple_model.report("smollm2-135m")
    assert text.count("PREDICTION") == 2
    for name in apple_model.CHIPS:
        assert f"| {name} |" in text


def document(device: str) -> dict:
    row = {"unit": "o_proj", "shape": "4096x4096", "time": {"median": 100.0}}
    return {
        "machine": {"device": device},
        "settings": {"bits": 4, "group_size": 64},
        "rows": [
            {**row, "variant": "stock", "sparsity": None},
            {**row, "variant": "row-grouped", "sparsity": None},
            {**row, "variant": "sparse 50%", "sparsity": 0.5},
        ],
    }


def test_a_measured_file_stands_beside_the_prediction(tmp_path, monkeypatch, capsys, found):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(document("Apple M4 Pro")))
    monkeypatch.setattr(sys, "argv", ["apple_model.py", "--compare", str(path)])
    apple_model.main()
    text = capsys.readouterr().out
    predicted = apple_model.predict(apple_model.CHIPS["M4 Pro"], found, [(4096, 4096)], None, 64).us
    assert f"| stock | {predicted:.1f} | 100.0 | {100 / predicted:.2f} |" in text
    assert "sparse 50%" in text
    assert "row-grouped" not in text


def test_an_unknown_device_needs_a_chip():
    with pytest.raises(SystemExit, match="--chip"):
        apple_model.compare(document("NVIDIA H200"), None)
    assert "as M1" in apple_model.compare(document("NVIDIA H200"), "M1")


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_the_emulated_kernel_touches_the_lines_that_are_worked_out(density, monkeypatch):
    """The model's lines are arithmetic; the emulator counts what the real body reads."""
    from tests.metal.emulator import emulate

    inputs, outputs = 96, 256
    layer = ZigzagLinear.from_linear(nn.Linear(inputs, outputs, bias=False), 64, 4)
    layer.weight, layer.scales, layer.biases = layout.quantize(
        mx.random.normal((outputs, inputs)).astype(mx.float16), 4, 64, 256
    )
    x = np.random.default_rng(3).permutation(np.arange(1, inputs + 1)).astype(np.float16)
    layer.set_threshold(float(round((1 - density) * inputs)) + 0.5)
    seen = []

    def run(launch, arrays):
        emulation = emulate(launch, arrays)
        seen.append(emulation.traffic)
        return emulation.outputs

    monkeypatch.setattr(launching, "run", run)
    mx.eval(gpu.sparse_gemv(mx.array(x), [layer])[0])
    active = x > (1 - density) * inputs
    chunks = projections.chunk_bytes(4, 64, 256, 2)
    product = [one for one in seen if "packed" in one][-1]  # after the first-use check, before the sum
    assert product["packed"].lines * 128 == projections.line_bytes(active, 1, chunks, 128)


def test_the_page_shows_what_the_command_prints():
    page = (ROOT / "docs" / "apple-model.md").read_text(encoding="utf-8")
    printed = apple_model.report("llama-3-8b").splitlines()
    numbers = [line for line in page.splitlines() if line.startswith("| ") and any(map(str.isdigit, line))]
    assert len(numbers) == 17 + 6  # four chips' calls, five chips' tokens, and the heads
    assert [line for line in numbers if line not in printed] == []
    assert [line for line in printed[:8] if line not in page] == []
