"""Commands in several processes, through MLX's ring on the loopback.

The same text as in one, said once; errors that end all of them.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from spqt_cli.cli import worker
from spqt_cli.decode import shard_blocks
from tests import ROOT
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


def test_the_first_process_alone_prints(folders):
    wanted = alone("generate", folders["llama"], *WORDS, "--json")
    first, second = processes.ring(2, [*GENERATE, folders["llama"], *WORDS, "--json"])
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert (second.out, second.err) == ("", "")
    found, expected = json.loads(first.out), json.loads(wanted.stdout)
    assert found["text"] == expected["text"]
    assert (found["processes"], found["parallel"], expected["processes"]) == (2, "tensor", 1)
    assert found["fused_blocks"]["fused"] == expected["fused_blocks"]["fused"] == 4
    assert found["weight_bytes_per_token"] < 0.8 * expected["weight_bytes_per_token"]


@pytest.mark.parametrize(
    ("changes", "more", "codes", "first_says", "second_says"),
    [
        ({}, ["--pipeline"], (4, 4), "mlx-lm has no pipeline for architecture llama", ""),
        ({}, ["--adapter-path", "."], (4, 4), "--adapter-path: mlx-lm runs neither adapters nor drafts", ""),
        ({"SPQT_SPARSITY": "7"}, [], (3, 2), "1 of 2 processes failed", "process 1: SPQT_SPARSITY='7'"),
    ],
)
def test_an_error_ends_all_processes_and_is_said_once(folders, changes, more, codes, first_says, second_says):
    command = [*GENERATE, folders["llama"], *WORDS, *more]
    first, second = processes.ring(2, command, changes=[AT_ONCE, AT_ONCE | changes])
    assert (first.code, second.code) == codes, first.err + second.err
    assert first_says in first.err
    assert second_says in second.err
    assert bool(second_says) == bool(second.err)
    assert "Traceback" not in first.err + second.err


def test_heads_that_processes_can_not_share(folders):
    ended = processes.ring(3, [*GENERATE, folders["llama"], *WORDS], changes=[AT_ONCE] * 3)
    assert [one.code for one in ended] == [4, 4, 4]
    assert "4 attention heads can't be divided among 3 processes" in ended[0].err


def test_what_needs_several_processes_or_one(folders):
    done = alone("generate", folders["llama"], "fox", "--pipeline")
    assert done.returncode == 2
    assert "--pipeline needs several processes" in done.stderr
    first, second = processes.ring(2, [*COMMAND, "inspect", folders["llama"]])
    assert (first.code, second.code) == (2, 2)
    assert "spqt inspect runs in one process, and 2 were started" in first.err
    assert second.err == ""


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
    first, second = start([*GENERATE, folders["llama"], "pack", "-m", 100000, "--ignore-chat-template",
                           "--max-kv-size", 64], tmp_path)  # fmt: skip
    assert first.stdout is not None
    assert first.stdout.read(20)  # it writes
    second.kill()
    _, err = first.communicate(timeout=60)
    second.communicate(timeout=60)
    assert first.returncode == 6, err
    assert "most likely another of the 2 processes ended" in err


def test_a_server_answers_as_one_process_does(folders, tmp_path):
    wanted = alone("generate", folders["llama"], *WORDS, "--quiet").stdout.strip("\n")
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
                assert json.loads(answer.read())["choices"][0]["text"].strip("\n") == wanted
        first.send_signal(signal.SIGTERM)
        assert first.wait(30) == 0
        assert second.wait(30) == 0
    finally:
        for one in (first, second):
            one.kill()
            one.communicate()
            time.sleep(0)
