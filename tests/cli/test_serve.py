"""`spqt serve`: how it begins, ends and fails as a command."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from spqt_cli.cli import worker
from tests.cli.test_commands import assert_error, process, spqt
from tests.lib.serving import connect, exchange, request, wait_for


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv(worker.MARK, raising=False)
    monkeypatch.delenv("SPQT_API_KEY", raising=False)


@contextlib.contextmanager
def running(model, *flags: object, code: str = "import spqt_cli.__main__ as m; m.main()", **environment: str):
    """The command, once it serves, with its port and what it said."""
    command = [sys.executable, "-c", code, "serve", model, "--port", 0, *flags]
    server = subprocess.Popen(
        [*map(str, command)], stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        said = ""
        while "serving" not in said:
            line = server.stderr.readline()
            assert line, said
            said += line
        yield server, int(said.split(" | ")[0].rpartition(":")[2]), said
    finally:
        server.kill()
        server.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_within_a_step_with_code_0(calibrated, number):
    with running(calibrated) as (server, port, said):
        assert "40% sparsity" in said
        assert "backend" in said
        with connect(port) as connection:
            connection.sendall(request({"prompt": "fox", "max_tokens": 450, "stream": True}))
            assert connection.recv(1000).startswith(b"HTTP/1.0 200")
            start = time.monotonic()
            server.send_signal(number)
            assert server.wait(10) == 0
            assert time.monotonic() - start < 3
            told = b""
            with contextlib.suppress(ConnectionError):
                while piece := connection.recv(1 << 16):
                    told += piece
        assert b'data: {"error": {"message": "the server ends"' in told
        assert server.stderr.read() == "spqt: the server has ended\n"


def test_a_signal_ends_it_while_it_loads(calibrated):
    code = "import time; from spqt_cli.decode import session; session.load = lambda *_, **__: time.sleep(60);"
    code += "import spqt_cli.__main__ as m; m.main()"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", code, "serve", str(calibrated), "--port", str(port)]
    server = subprocess.Popen(command, env={**os.environ, worker.MARK: "1"}, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: health(port) == 503, 20)
        server.terminate()
        assert server.wait(10) == 0
    finally:
        server.kill()
        server.communicate()


def test_a_signal_ends_it_as_soon_as_it_listens(calibrated):
    code = """
import os, signal, time
from spqt_cli.decode import session
from spqt_cli.serve import server
session.load = lambda *_, **__: time.sleep(60)
opens = server.Server.open_to
def open_to(self, *given):
    opens(self, *given)
    os.kill(os.getpid(), signal.SIGTERM)
server.Server.open_to = open_to
import spqt_cli.__main__ as m
m.main()
"""
    command = [sys.executable, "-c", code, "serve", str(calibrated), "--port", "0"]
    done = subprocess.run(
        command, env={**os.environ, worker.MARK: "1"}, capture_output=True, timeout=40, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


def health(port: int) -> int:
    try:
        return exchange(port, request(b"", "/health", "GET"))[0]
    except ConnectionError:
        return 0


def test_fault_76_a_dead_generating_thread_ends_the_process(calibrated):
    code = (
        "from spqt_cli.serve import generator\n"
        "generator.Generator._serve_single = lambda *_: 1 / 0\n"
        "import spqt_cli.__main__ as m; m.main()"
    )
    with running(calibrated, code=code, SPQT_WORKER="1") as (server, port, _):
        assert exchange(port, request({"prompt": "fox", "seed": 1}))[0] == 503  # with a seed it runs alone
        assert server.wait(10) == 6
        said = server.stderr.read()
        assert "the generating thread ended: ZeroDivisionError" in said
        assert "hint" in said


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_fault_72_off_loopback_a_key_is_needed(calibrated, host):
    assert_error(process("serve", calibrated, "--host", host), 2, "API key", "openssl rand")


def test_fault_72_off_loopback_with_a_key(calibrated, tmp_path):
    key = tmp_path / "key"
    key.write_text("0123456789abcdef\n")
    with running(calibrated, "--host", "0.0.0.0", "--api-key-file", key, "--log-level", "INFO") as one:
        server, port, _ = one
        assert exchange(port, request(b"", "/v1/models", "GET"))[0] == 401
        sent = request(b"", "/v1/models", "GET", Authorization="Bearer 0123456789abcdef")
        assert exchange(port, sent)[0] == 200
        server.terminate()
        server.wait(10)
        assert "0123456789abcdef" not in server.stderr.read()


def test_a_port_that_is_taken_is_told(calibrated):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert_error(process("serve", calibrated, "--port", taken.getsockname()[1]), 7, "--port")


@pytest.mark.parametrize(
    ("flags", "code", "word"),
    [
        (["--temp", "-1"], 2, "--temp"),
        (["--top-k", "512"], 2, "--top-k"),
        (["--sparsity", "2"], 2, "sparsity"),
        (["--dense", "--sparsity", "0.3"], 2, "exclude"),
        (["--chat-template-args", "[]"], 2, "object"),
        (["--chat-template-args", "{"], 2, "JSON"),
        (["--log-level", "LOUD"], 2, "--log-level"),
        (["--host", "no such host"], 2, "--host"),
        (["--api-key-file", "nowhere/key"], 3, "can't be read"),
        (["--model", "another/model"], 2, "two models"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_flags_are_told_before_anything_is_loaded(calibrated, monkeypatch, flags, code, word):
    monkeypatch.setenv(worker.MARK, "1")
    assert_error(spqt("serve", calibrated, *flags), code, word)


def test_a_short_key_is_refused(calibrated, monkeypatch):
    monkeypatch.setenv(worker.MARK, "1")
    monkeypatch.setenv("SPQT_API_KEY", "short")
    result = spqt("serve", calibrated)
    assert_error(result, 2, "API key")
    assert b"short" not in result.stderr


def test_a_damaged_model_is_told_at_once(tmp_path):
    assert_error(process("serve", tmp_path), 3, "hint")
