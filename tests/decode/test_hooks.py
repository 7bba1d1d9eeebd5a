"""The hook: mlx-lm's own server on a converted model, float32 on the CPU, folders left as they were."""

import json
import subprocess
import sys
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest

from spqt_cli.decode import hooks, session
from spqt_cli.decode.layers import zigzag_layers
from spqt_cli.format.folder import Folder
from spqt_cli.system import heap
from tests.conftest import tiny_checkpoint

ON_CPU = mx.default_device().type == mx.DeviceType.cpu


@pytest.fixture(scope="module")
def half_precision(tmp_path_factory):
    """A converted folder stored in float16, with thresholds."""
    from spqt_cli.calibrate import calibrate
    from spqt_cli.convert import convert

    folder = tmp_path_factory.mktemp("half")
    source = tiny_checkpoint(folder / "source", dtype=mx.float16, torch_dtype="float16")
    convert.convert(str(source), folder / "out", convert.ConvertOptions(bits=4, group_size=32))
    calibrate.calibrate(
        folder / "out", calibrate.CalibrateOptions(sparsity=0.3, tokens=1024), lambda *_: None
    )
    return folder / "out"


def test_installing_twice_changes_nothing():
    hooks.install()
    before = (nn.Linear.to_quantized, nn.Module.load_weights)
    hooks.install()
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


def testshared_input_share_a_launch(half_precision):
    loaded = session.load(half_precision)
    block = loaded.model.model.layers[0]
    attention = block.self_attn
    assert attention.q_proj.shared_input is attention.k_proj.shared_input is attention.v_proj.shared_input
    assert block.mlp.gate_proj.shared_input is block.mlp.up_proj.shared_input
    assert len(block.mlp.gate_proj.shared_input.layers) == 2
    assert block.mlp.down_proj.shared_input.layers == [block.mlp.down_proj]
    assert attention.o_proj.shared_input.layers == [attention.o_proj]


def test_brackets_in_the_path_are_no_pattern(half_precision, tmp_path):
    import shutil

    odd = tmp_path / "a [b] *c"
    shutil.copytree(half_precision, odd)
    assert len(zigzag_layers(session.load(odd).model)) == 14


SERVER = """
import json, os, sys, threading, urllib.request
import mlx.nn as nn
from mlx_lm import server
from spqt_cli.cli import mlx_lm

dtypes, started, holder = set(), threading.Event(), {}
norm, forever = nn.RMSNorm.__call__, server.ThreadingHTTPServer.serve_forever

def recording_norm(self, x):
    dtypes.add(str(x.dtype))
    return norm(self, x)

def recorded(self, *args):
    holder["port"] = self.server_address[1]
    started.set()
    forever(self, *args)

nn.RMSNorm.__call__, server.ThreadingHTTPServer.serve_forever = recording_norm, recorded
command = ["server", "--model", sys.argv[1], "--port", "0"]
threading.Thread(target=mlx_lm.run, args=(command,), daemon=True).start()
started.wait(60)
body = {"messages": [{"role": "user", "content": "fox"}], "max_tokens": 4}
url = f"http://127.0.0.1:{holder['port']}/v1/chat/completions"
request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
answer = json.load(urllib.request.urlopen(request, timeout=60))
print(json.dumps({"dtypes": sorted(dtypes), "tokens": answer["usage"]["completion_tokens"]}), flush=True)
os._exit(0)  # what is tested is over; an orderly exit of the server is not part of it
"""


def test_the_server_answers_in_float32(half_precision):
    """mlx-lm's HTTP server through the passthrough: it generates in a thread of its own."""
    result = subprocess.run(
        [sys.executable, "-c", SERVER, str(half_precision)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["tokens"] >= 1
    if ON_CPU:
        assert answer["dtypes"] == ["mlx.core.float32"]


@pytest.mark.skipif(not ON_CPU, reason="a GPU has pages of its own")
def test_weights_that_the_cpu_decodes_from_are_read_into_large_pages(converted, monkeypatch):
    asked: list[int] = []

    @contextmanager
    def in_large_pages(size):
        asked.append(size)
        yield

    monkeypatch.setattr(heap, "in_large_pages", in_large_pages)
    session.load(converted)
    assert asked == [sum(file.stat().st_size for file in converted.glob("*.safetensors"))]
    session.load_lazily(Folder(converted))  # nothing is read yet
    assert len(asked) == 1
