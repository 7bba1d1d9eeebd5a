"""llama.cpp as the peer of a benchmark: built from local sources, asked for one sample at a time."""

import atexit
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent.parent / "build" / "peer"


def sources(path: Path) -> Path:
    """The llama.cpp source folder of a checkout, of an unpacked llama-cpp-python, or of its .tar.gz."""
    if path.suffix == ".gz":
        unpacked = BUILD / "sources"
        with tarfile.open(path) as archive:
            archive.extractall(unpacked, filter="data")
        (path,) = unpacked.iterdir()
    for folder in (path, path / "vendor" / "llama.cpp"):
        if (folder / "include" / "llama.h").is_file():
            return folder.resolve()
    sys.exit(f"{path}: no include/llama.h; give a llama.cpp checkout or llama-cpp-python's sources")


class Peer:
    """A peer program; `ask` sends one of its commands and returns the number it answers.

    Between its turns it is stopped: its thread pool polls for work for long after the last, which takes a
    core from whoever is measured next. Its own clock runs only inside a turn, so a stop costs it nothing.
    """

    def __init__(self, path: Path) -> None:
        folder = sources(path)
        settings = [f"-DLLAMA_CPP={folder}", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON"]
        jobs = str(os.cpu_count() or 1)
        BUILD.mkdir(parents=True, exist_ok=True)
        with (BUILD.parent / "peer.log").open("w") as log:
            for command in (
                ["cmake", "-S", str(HERE), "-B", str(BUILD / "cmake"), *settings],
                ["cmake", "--build", str(BUILD / "cmake"), "--target", "peer", "-j", jobs],
            ):
                if subprocess.run(command, stdout=log, stderr=log, check=False).returncode:
                    sys.exit("llama.cpp did not build: see build/peer.log")
        self._process = subprocess.Popen(
            [str(BUILD / "cmake" / "peer")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self._process.kill)  # a stopped process would outlive us
        self._stop()

    def ask(self, command: str) -> float:
        """The number that the program answers to a command of peer.cpp."""
        return float(self._line(command))

    def load(self, model: Path) -> None:
        """Make `decode` and `prompt` run a GGUF file."""
        if self._line(f"load {model}") != "ok":
            sys.exit(f"{model}: llama.cpp can't load it")

    def quantize(self, model: Path, output: Path) -> None:
        """Write a GGUF file as another one of Q4_0, whatever its own types are."""
        if self._line(f"quantize {model}\t{output}") != "ok":
            sys.exit(f"{model}: llama.cpp can't quantize it")

    def cpu_seconds(self) -> float:
        """What all threads of the program have spent so far."""
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    def _line(self, command: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        if answer:
            self._stop()
        if not answer:
            sys.exit(f"the llama.cpp program ended at {command!r}")
        return answer

    def _stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)  # once this returns, none of its threads runs
