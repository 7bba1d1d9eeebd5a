"""Model-running commands live in a child process: what ends it, the parent says in a line."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spqt_cli.cli import ending, main, worker
from spqt_cli.errors import Terminated


def start(calibrated: Path, tokens: int, **how) -> tuple[subprocess.Popen, int]:
    """A generate that is running, and the process id of its worker."""
    command = [sys.executable, "-m", "spqt_cli", "generate", "--model", calibrated, "-p", "fox", "-m", tokens]
    parent = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    for _ in range(600):
        found = children.read_text().split()
        if found:
            return parent, int(found[0])
        time.sleep(0.05)
    raise AssertionError("no worker was started")


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGABRT, 6, "GPU"), (signal.SIGSEGV, 6, "MLX"), (signal.SIGKILL, 5, "memory")],
)
def test_fault_44_an_aborted_worker_is_reported(calibrated, number, code, word):
    before = {path.name: path.read_bytes() for path in calibrated.iterdir()}
    parent, child = start(calibrated, 400)
    os.kill(child, number)
    _, error = parent.communicate(timeout=60)
    assert parent.returncode == code
    assert word in error.decode()
    assert "Traceback" not in error.decode()
    assert {path.name: path.read_bytes() for path in calibrated.iterdir()} == before


@linux
def test_fault_54_terminate_ends_both(calibrated):
    parent, child = start(calibrated, 400)
    time.sleep(0.5)  # let the child install its handler; before that the default ends it, which also is right
    parent.terminate()
    parent.communicate(timeout=60)
    assert parent.returncode in (143, 6)
    assert not Path(f"/proc/{child}").exists()


@linux
def test_sigterm_ends_a_worker_that_does_not_hear_it(calibrated):
    """As within a long call of MLX: here it is stopped."""
    parent, child = start(calibrated, 100_000)
    time.sleep(0.5)
    os.kill(child, signal.SIGSTOP)
    parent.terminate()
    _, error = parent.communicate(timeout=60)
    assert (parent.returncode, error) == (143, b"")
    assert not Path(f"/proc/{child}").exists()


def test_sigterm_is_the_systems_again_once_a_command_has_ended(monkeypatch):
    """Raised while the interpreter ends, ours would print a traceback."""
    before = signal.getsignal(signal.SIGTERM)
    seen = []
    monkeypatch.setattr(main, "_main", lambda: seen.append(signal.getsignal(signal.SIGTERM)))
    try:
        main.main()
        assert seen == [ending.terminate]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


SWALLOWS = """
import os, signal, sys, time
from spqt_cli.cli import ending

class Dropped:
    def __del__(self):  # Python drops what is raised here
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))

try:
    with ending.by_exceptions():
        print("begun", flush=True)
        Dropped()
        time.sleep(60)
except BaseException as error:
    print(type(error).__name__, flush=True)
"""


@pytest.mark.parametrize(("number", "ends"), [("SIGTERM", "Terminated"), ("SIGINT", "KeyboardInterrupt")])
def test_a_signal_in_a_destructor_is_not_lost_nor_printed(number, ends):
    result = subprocess.run(
        [sys.executable, "-c", SWALLOWS, number], capture_output=True, text=True, check=False, timeout=30
    )
    assert result.stderr == ""
    assert result.stdout.split() == ["begun", ends]


def test_sigterm_twice_at_once_is_one(monkeypatch):
    """`timeout` tells the group, and so both; a parent passes on what it was told."""
    monkeypatch.setattr(ending, "_told", -ending.BOTH_TOLD)
    now = [100.0]
    monkeypatch.setattr(ending.time, "monotonic", lambda: now[0])
    with pytest.raises(Terminated):
        ending.terminate(signal.SIGTERM, None)
    ending.terminate(signal.SIGTERM, None)
    now[0] += 5
    with pytest.raises(Terminated):
        ending.terminate(signal.SIGTERM, None)


@linux
@pytest.mark.parametrize("group", [False, True])
def test_an_interrupt_outside_a_terminal_ends_both(calibrated, group):
    """Sent to the parent alone, as a supervisor does, or to both, as `timeout -s INT` does."""
    parent, child = start(calibrated, 100_000, start_new_session=True)
    time.sleep(3)
    if group:
        os.killpg(parent.pid, signal.SIGINT)
    else:
        parent.send_signal(signal.SIGINT)
    _, error = parent.communicate(timeout=60)
    assert parent.returncode == 130
    assert "Traceback" not in error.decode()
    assert not Path(f"/proc/{child}").exists()


@linux
def test_ctrl_c_amid_an_answer_ends_the_line_and_says_so(calibrated):
    """In a terminal, which echoes ^C behind the text and interrupts parent and worker both."""
    command = [sys.executable, "-m", "spqt_cli", "run", str(calibrated), "fox", "-m", "100000", "--quiet"]
    process, terminal = pty.fork()
    if not process:
        os.execv(sys.executable, command)
    shown = os.read(terminal, 1000)  # waits for the first text
    os.write(terminal, b"\x03")
    with contextlib.suppress(OSError):  # the terminal's end
        while more := os.read(terminal, 1000):
            shown += more
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 130
    assert shown.endswith(b"^C\r\nspqt: interrupted\r\n")


@linux
def test_an_interrupt_that_was_ignored_before_stays_ignored(calibrated):
    ignored = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731 - as a script's `&` does
    parent, child = start(calibrated, 100_000, start_new_session=True, preexec_fn=ignored)
    time.sleep(1)
    parent.send_signal(signal.SIGINT)
    time.sleep(1)
    assert parent.poll() is None
    parent.terminate()
    parent.communicate(timeout=60)
    assert not Path(f"/proc/{child}").exists()


@linux
def test_a_killed_parent_takes_the_worker_along(calibrated):
    parent, child = start(calibrated, 400)
    time.sleep(1.0)
    parent.kill()
    parent.communicate(timeout=60)
    for _ in range(200):
        if not Path(f"/proc/{child}").exists():
            return
        time.sleep(0.05)
    raise AssertionError("the worker went on for nobody")


def test_only_commands_that_run_models_get_a_worker(monkeypatch):
    monkeypatch.delenv(worker.MARK, raising=False)
    assert worker.wanted(["generate", "--model", "x"])
    assert worker.wanted(["calibrate", "x"])
    assert worker.wanted(["convert", "x", "--calibrate"])
    assert worker.wanted(["convert", "x", "--sparsity=0.4"])
    assert not worker.wanted(["convert", "generate"])
    assert not worker.wanted(["convert", "x", "--calibrate", "--dry-run"])
    assert not worker.wanted(["generate", "--help"])
    assert not worker.wanted(["--version"])
    monkeypatch.setenv(worker.MARK, "1")
    assert not worker.wanted(["generate"])


def test_a_worker_takes_no_module_of_the_working_directory(calibrated, tmp_path):
    """Of a checkout that is not installed, or of a folder that somebody else filled."""
    (tmp_path / "spqt_cli").mkdir()
    (tmp_path / "spqt_cli" / "__init__.py").write_text("raise SystemExit('not the installed one')")
    (tmp_path / "numpy.py").write_text("raise SystemExit('not the installed one')")
    command = [sys.executable, "-P", "-m", "spqt_cli", "run", str(calibrated), "fox", "-m", "2"]
    environment = {name: value for name, value in os.environ.items() if name != worker.MARK}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tok/s" in done.stderr
