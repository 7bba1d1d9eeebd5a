"""Run the CPU kernels under sanitizers: `python cpu/sanitize.py`, from the root; Linux with g++.

1. fuzz.cpp under AddressSanitizer and UndefinedBehaviorSanitizer, then under ThreadSanitizer.
2. The tests of the extension, built with the first two.

Each runs with every instruction set that the machine can execute; isa.py has NEON under the first two.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 150
SETTINGS = {
    # Leaks: Python and MLX keep what they made until the process ends. Use after return: the stacks that
    # GCC 13 sets up for it are aligned to less than a 64-byte vector needs.
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
    "SPQT_POISON": "1",  # set here because the extension is loaded before the tests set it
}
# Puts the built extension in place of the installed one, then runs the tests.
RUN_TESTS = """
import importlib.machinery, importlib.util, sys
import mlx.core, pytest, spqt_cli
loader = importlib.machinery.ExtensionFileLoader("spqt_cli._cpu", sys.argv[1])
module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
loader.exec_module(module)
sys.modules[loader.name] = spqt_cli._cpu = module
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def run(*command: str, **variables: str) -> None:
    """Run a command from the root; a failure ends the program with its code."""
    print("+", " ".join(part if "\n" not in part else "..." for part in command), flush=True)
    code = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **SETTINGS, **variables}, check=False
    ).returncode
    if code:
        sys.exit(code)


def build(kind: str, target: str) -> Path:
    """The folder where a target has been built with sanitizers of that kind, or with none."""
    folder = ROOT / "build" / f"sanitize-{kind.replace(',', '-') or 'none'}"
    run("cmake", "-S", "cpu", "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
        f"-DSPQT_SANITIZE={kind}", f"-DPython_EXECUTABLE={sys.executable}")  # fmt: skip
    run("cmake", "--build", str(folder), "--target", target)
    return folder


def main() -> None:
    """Build and run everything; the exit code says whether it was clean."""
    for kind in ("address,undefined", "thread"):
        run(str(build(kind, "fuzz") / "fuzz"), str(ROUNDS))
    (extension,) = build("address,undefined", "_cpu").glob("_cpu*.so")
    # Python itself has neither; without the second the sanitizer finds no `throw` to stand before
    names = ("libasan.so", "libstdc++.so.6")
    libraries = [subprocess.check_output(["g++", f"-print-file-name={n}"], text=True).strip() for n in names]
    tests = sorted(str(path) for path in (ROOT / "tests" / "backends" / "cpu").glob("test_*.py"))
    tests += [str(ROOT / "tests" / "decode" / f"test_{name}.py") for name in ("attention_cpu", "chain")]
    run(sys.executable, "-c", RUN_TESTS, str(extension), *tests, LD_PRELOAD=":".join(libraries))
    print("clean under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer")


if __name__ == "__main__":
    main()
