"""Commands in several processes, through MLX's ring on the loopback.

The same text as in one, said once; errors that end all of them.
"""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spqt_cli.cli import worker
from spqt_cli.decode import parallel, session, shard_blocks
from spqt_cli.errors import UnsupportedError, UsageError
from spqt_cli.format.folder import Folder
from spqt_cli.system import launched
from tests import ROOT
from tests.decode.test_sharding import Group
from tests.distributed import make, run
from tests.lib import processes

COMMAND = [sys.executable, "-m", "spqt_cli"]
GENERATE = [*COMMAND, "generate"]
WORDS = ["pack my box", "-m", 12, "--ignore-chat-template"]
AT_ONCE = {worker.MARK: str(os.getpid())}  # without a parent that would end with what its child ended with


@pytest.fixture(scope="module", autouse=True)
def _one_thread_each():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENBLAS_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Tiny models: with `shard` of mlx-lm's, of ours, with experts and a pipeline."""
    base = tmp_path_factory.mktemp("families")
    return {name: make(name, base, {}) for name in ("llama", "gemma3", "qwen3_moe")}


def alone(*arguments: object) -> subprocess.CompletedProcess:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_two_processes_give_the_tokens_of_one(folders):
    several, one = (run(list(folders.values()), count) for count in (2, 1))
    for name, there, here in zip(folders, several, one, strict=True):
        assert "failed" not in there, there
        for way in ("tensor", "pipeline"):
            if way == "pipeline" and name != "qwen3_moe":
                assert "no pipeline for architecture" in there[way]["reason"]
                continue
            for kind in ("dense", "sparse"):
                assert there[way][kind] == here["one"][kind], (name, way, kind)
            assert abs(there[way]["sparse_skipped"] - here["one"]["sparse_skipped"]) < 0.005
            assert here["one"]["sparse_skipped"] > 0.2
    assert "gemma3" in shard_blocks.TYPES


@pytest.fixture(scope="module")
def expected(folders) -> dict[str, Any]:
    """What one process prints of the first model."""
    return json.loads(alone("generate", folders["llama"], *WORDS, "--json").stdout)


def test_the_first_process_alone_prints(folders, expected):
    first, second = processes.ring(2, [*GENERATE, folders["llama"], *WORDS, "--json"])
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert (second.out, second.err) == ("", "")
    found = json.loads(first.out)
    assert found["text"] == expected["text"]
    assert (found["processes"], found["parallel"], expected["processes"]) == (2, "tensor", 1)
    assert found["fused_blocks"]["fused"] == expected["fused_blocks"]["fused"] == 4
    assert found["weight_bytes_per_token"] < 0.8 * expected["weight_bytes_per_token"]


def test_an_error_of_one_process_ends_all(folders):
    changes = [AT_ONCE, AT_ONCE | {"SPQT_SPARSITY": "7"}]
    first, second = processes.ring(2, [*GENERATE, folders["llama"], *WORDS], changes=changes)
    assert (first.code, second.code) == (3, 2), first.err + second.err
    assert "1 of 2 processes failed" in first.err
    assert "process 1: SPQT_SPARSITY='7'" in second.err
    assert "Traceback" not in first.err + second.err


def test_what_can_not_be_run_by_several_is_refused(folders, monkeypatch):
    folder = Folder(folders["llama"])
    several = parallel.Processes(Group(0, 2), 0, 2, pipeline=False)
    monkeypatch.setattr(parallel.Processes, "all", lambda self, numbers, *_: numbers)
    monkeypatch.setattr(parallel, "join", lambda *, pipeline: several)
    with pytest.raises(UnsupportedError, match="--adapter-path: mlx-lm runs neither adapters nor drafts"):
        session.load(folder, pipeline=False, adapter_path="any")
    for config, size, said in (
        ({"num_attention_heads": 4, "num_key_value_heads": 2}, 4, "2 heads of keys"),
        ({"num_attention_heads": 9, "num_key_value_heads": 3}, 2, "9 attention heads"),
    ):
        with pytest.raises(UnsupportedError, match=f"{said} can't be divided among {size} processes"):
            parallel.check_heads(config, size)
    parallel.check_heads({"num_attention_heads": 4, "num_key_value_heads": 1, "kv_lora_rank": 64}, 4)
    with parallel.sharding(Group(0, 5), None):
        with pytest.raises(UnsupportedError, match="mlx-lm has no pipeline for architecture llama"):
            parallel.prepare(SimpleNamespace(), folder.config)
        layers = SimpleNamespace(pipeline=None, layers=[None] * 4)
        with pytest.raises(UnsupportedError, match="4 layers for 5 processes"):
            parallel.prepare(SimpleNamespace(model=layers), folder.config)
    with (
        parallel.sharding(None, Group(0, 2)),
        pytest.raises(UnsupportedError, match="can't run architecture gpt2 tensor parallel"),
    ):
        parallel.prepare(SimpleNamespace(), {"model_type": "gpt2"})


def test_what_needs_several_processes_or_one(folders, monkeypatch, tmp_path):
    with pytest.raises(UsageError, match="--pipeline needs several processes"):
        parallel.join(pipeline=True)
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["127.0.0.1:1"], ["127.0.0.1:2"]]')
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    done = alone("inspect", folders["llama"])
    assert done.returncode == 2
    assert "spqt inspect runs in one process, and 2 were started" in done.stderr
    monkeypatch.setenv("MLX_RANK", "1")
    assert (alone("inspect", folders["llama"]).stderr, launched.size(), launched.rank()) == ("", 2, 1)


def start(command: list[object], folder: Path) -> list[subprocess.Popen]:
    """Two connected processes that run until they are ended."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in processes.free_ports(2)]))
    known = os.environ | {"MLX_HOSTFILE": str(hosts)}
    return [
        subprocess.Popen(
            [*map(str, command)], cwd=ROOT, env=known | {"MLX_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip


def test_a_process_that_is_killed_ends_the_other(folders, tmp_path):
    endless = ["pack", "-m", 1000000, "--ignore-chat-template", "--max-kv-size", 64]
    first, second = start([*GENERATE, folders["llama"], *endless], tmp_path)
    assert first.stdout is not None
    assert first.stdout.read(20)  # it writes
    second.kill()
    _, err = first.communicate(timeout=60)
    second.communicate(timeout=60)
    assert first.returncode == 6, err
    assert "process 0: another process has ended" in err


def test_a_server_answers_as_one_process_does(folders, expected, tmp_path):
    first, second = start([*COMMAND, "serve", folders["llama"], "--port", 0], tmp_path)
    try:
        assert first.stderr is not None
        line = next(line for line in first.stderr if "serving" in line)
        assert "tensor parallel in 2 processes" in line
        (port,) = re.findall(r":(\d+) \|", line)
        body = json.dumps({"prompt": "pack my box", "max_tokens": 12}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
        )
        for _ in range(2):  # the second one from the prompt's cache
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.loads(answer.read())["choices"][0]["text"] == expected["text"]
        first.send_signal(signal.SIGTERM)
        assert first.wait(30) == 0
        assert second.wait(30) == 0
    finally:
        for one in (first, second):
            one.kill()
            one.communicate()
