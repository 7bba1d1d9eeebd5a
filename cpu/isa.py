"""Run fuzz.cpp with every instruction set: `python cpu/isa.py`, from the root; Linux with g++.

1. As built for this machine, with all that it can execute.
2. On x86, the same program on emulated machines without AVX-512, and without AVX at all.
3. Elsewhere than on ARM, NEON: built by a cross compiler and emulated; once more with sanitizers.

What could not be run is named in the end, and the exit code is then 1.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from sanitize import ROOT, SETTINGS, build, run

CROSS, ARM_EMULATOR, X86_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64", "qemu-x86_64"
SOURCES = [
    "isa.cpp",
    "exact.cpp",
    "fuzz.cpp",
    "fuzz_products.cpp",
    "fuzz_decode.cpp",
    "fuzz_compensate.cpp",
    "fuzz_slopes.cpp",
    "dispatch.cpp",
    "pool.cpp",
]
ROUNDS, EMULATED_ROUNDS = 100, 20
IS_ARM = platform.machine() in ("aarch64", "arm64")


def fuzz(*command: str, rounds: int) -> list[str]:
    """The instruction sets that a program ran with; a wrong sum ends this one."""
    print("+", *command, rounds, flush=True)
    done = subprocess.run(
        [*command, str(rounds)],
        env={**os.environ, **SETTINGS},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(done.returncode if done.returncode > 0 else 1)
    return [line.split(":")[0] for line in done.stdout.splitlines() if line.endswith("rounds")]


def emulated_x86(program: str) -> list[str]:
    """Runs the program on x86 machines that lack what this one has; returns what could not be run."""
    if not shutil.which(X86_EMULATOR):
        return [f"machines without AVX-512 and without AVX (no {X86_EMULATOR}; apt: qemu-user)"]
    for machine, sets in (("max", ["avx2", "baseline"]), ("Nehalem", ["baseline"])):
        found = fuzz(X86_EMULATOR, "-cpu", machine, program, rounds=EMULATED_ROUNDS)
        if found != sets:
            sys.exit(f"{X86_EMULATOR} -cpu {machine} ran {found}, not {sets}")
    return []


def emulated_arm() -> list[str]:
    """Builds and runs NEON kernels, as they are and with sanitizers; returns what could not be run."""
    if missing := [tool for tool in (CROSS, ARM_EMULATOR) if not shutil.which(tool)]:
        return [f"NEON (no {', no '.join(missing)}; apt: g++-aarch64-linux-gnu qemu-user)"]
    libc = subprocess.check_output([CROSS, "-print-file-name=libc.so.6"], text=True).strip()
    system = Path(libc).resolve().parent.parent
    for name, options in {
        "plain": ["-O3"],
        "sanitized": ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"],
    }.items():
        program = str(ROOT / "build" / f"fuzz-neon-{name}")
        run(CROSS, *options, "-std=c++20", "-pthread", "-DSPQT_ISA=baseline", "-o", program,
            *(f"cpu/{source}" for source in SOURCES))  # fmt: skip
        fuzz(ARM_EMULATOR, "-L", str(system), program, rounds=EMULATED_ROUNDS)
    return []


def main() -> None:
    """Build and run everything; the exit code says whether all was run and right."""
    program = str(build("", "fuzz") / "fuzz")
    here = fuzz(program, rounds=ROUNDS)
    left_out: list[str] = []
    if not IS_ARM:
        left_out = emulated_x86(program) + emulated_arm()
        for name, words in (("avx512", "AVX-512"), ("avx512vnni", "AVX-512 with VNNI and VBMI")):
            if name not in here:
                left_out.append(f"{words} (this machine lacks it, and qemu does not emulate it)")
    if left_out:
        sys.exit("NOT RUN: " + "; ".join(left_out))
    print("right with every instruction set" + (" of ARM" if IS_ARM else ": AVX-512, AVX2, SSE2 and NEON"))


if __name__ == "__main__":
    main()
