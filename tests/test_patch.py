"""The hook: mlx-lm's own server on a converted model, float32 on the CPU, folders left as they were."""

import json
import threading
import urllib.request

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest

from spqt_cli import model, patch
from spqt_cli.patch import zigzag_layers
from tests.conftest import tiny_checkpoint

ON_CPU = mx.default_device().type == mx.DeviceType.cpu


@pytest.fixture(scope="module")
def half_precision(tmp_path_factory):
    """A converted folder stored in float16, with thresholds."""
    from spqt_cli import calibrate, convert

    folder = tmp_path_factory.mktemp("half")
    source = tiny_checkpoint(folder / "source", dtype=mx.float16, torch_dtype="float16")
    convert.convert(str(source), folder / "out", convert.ConvertOptions(bits=4, group_size=32))
    calibrate.calibrate(
        folder / "out", calibrate.CalibrateOptions(sparsity=0.3, tokens=1024), lambda *_: None
    )
    return folder / "out"


def test_installing_twice_changes_nothing():
    before = (nn.Linear.to_quantized, nn.Module.load_weights)
    patch.install()
    assert before == (nn.Linear.to_quantized, nn.Module.load_weights)


def test_other_modes_quantize_as_before():
    layer = nn.Linear(64, 32).to_quantized(group_size=32, bits=4)
    assert type(layer) is nn.QuantizedLinear


def test_the_stored_folder_keeps_its_dtype(half_precision):
    stored = mx.load(str(half_precision / "model.safetensors"))
    assert {value.dtype for value in stored.values()} == {mx.float16, mx.uint32}


@pytest.mark.skipif(not ON_CPU, reason="float32 is the CPU's remedy")
def test_activations_are_float32_on_the_cpu(half_precision):
    loaded, _ = mlx_lm.load(str(half_precision))
    assert loaded(mx.array([[1, 2, 3]])).dtype == mx.float32
    assert loaded.model.norm.weight.dtype == mx.float32


def test_a_model_without_zigzag_layers_is_left_alone(tmp_path):
    source = tiny_checkpoint(tmp_path / "plain", dtype=mx.bfloat16)
    loaded, _ = mlx_lm.load(str(source))
    assert loaded.model.norm.weight.dtype == mx.bfloat16


def test_siblings_share_a_launch(half_precision):
    loaded = model.load(half_precision)
    block = loaded.model.model.layers[0]
    attention = block.self_attn
    assert attention.q_proj._siblings is attention.k_proj._siblings is attention.v_proj._siblings
    assert block.mlp.gate_proj._siblings is block.mlp.up_proj._siblings is not None
    assert block.mlp.down_proj._siblings is None
    assert attention.o_proj._siblings is None


def test_brackets_in_the_path_are_no_pattern(half_precision, tmp_path):
    import shutil

    odd = tmp_path / "a [b] *c"
    shutil.copytree(half_precision, odd)
    assert len(zigzag_layers(model.load(odd).model)) == 14


def test_the_server_answers_in_float32(half_precision, monkeypatch):
    """mlx-lm's HTTP server, unmodified, generates in a thread of its own."""
    import sys

    from mlx_lm import server

    dtypes = []
    original = nn.RMSNorm.__call__
    monkeypatch.setattr(nn.RMSNorm, "__call__", lambda self, x: dtypes.append(x.dtype) or original(self, x))
    monkeypatch.setattr(sys, "argv", ["server", "--model", str(half_precision), "--port", "0"])
    started, holder = threading.Event(), {}

    forever = server.ThreadingHTTPServer.serve_forever

    def recorded(self, *args):
        holder["server"] = self
        started.set()
        forever(self, *args)

    monkeypatch.setattr(server.ThreadingHTTPServer, "serve_forever", recorded)
    thread = threading.Thread(target=server.main, daemon=True)
    thread.start()
    assert started.wait(60)
    port = holder["server"].server_address[1]
    body = {"messages": [{"role": "user", "content": "fox"}], "max_tokens": 4}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    holder["server"].shutdown()
    assert answer["usage"]["completion_tokens"] >= 1
    if ON_CPU:
        assert set(dtypes) == {mx.float32}
