"""Counts the instructions per weight in the kernel's inner loop, in clang's LLVM IR at -O2.

    python -m tests.count_instructions

The loop is the block with the most fused multiply-adds. Loads, addresses and control are counted apart:
they cost memory units and scalar slots, not the arithmetic that Apple GPUs are short of.
"""

import collections
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from spqt_cli import geometry, gpu, gpu_text, layout, selftest
from tests.emulator import metal_text

SHIM = Path(__file__).parent / "emulator" / "shim_clang.h"
FREE = ("load", "phi", "br", "getelementptr", "bitcast", "fpext")  # Apple's arithmetic takes half operands
UNROLL = 2
DECODES = {0: "exponent and subtract", 1: "convert", 2: "subnormal"}


def block(bits: int, decode: int, clang: str) -> list[str]:
    """The opcodes of the inner loop for codes of `bits`."""
    case = selftest.Case((128,), 100, bits)
    cut = geometry.Geometry(32, 4, 32, UNROLL, 128, 4, decode, 1000)
    (matrix,) = selftest.matrices(case)
    x = selftest.vector(case)
    plan = gpu.make_plan(x.shape, x.dtype, [matrix], cut, dense=False)
    assert plan.gemv is not None
    text = metal_text(plan.gemv, [x, *plan.inputs], gpu_text.header())
    flags = ["--target=aarch64-linux-gnu", "-std=c++14", "-ffreestanding", "-O2", "-w", "-S", "-emit-llvm"]
    flags += ["-fno-vectorize", "-fno-slp-vectorize", "-o", "-"]
    with tempfile.TemporaryDirectory() as folder:
        unit = Path(folder) / "kernel.cpp"
        unit.write_text(f'#include "{SHIM}"\n{text}')
        ir = subprocess.run([clang, *flags, str(unit)], capture_output=True, text=True, check=True).stdout
    blocks = re.split(r"\n\d+:", ir)
    inner = max(blocks, key=lambda one: one.count("@_Z3fmafff("))
    lines = re.findall(r"^\s+(?:%\S+ = )?(?:tail )?(\w+)", inner, re.M)
    return [one for one in lines if one != "store"]


def per_weight(bits: int, decode: int, clang: str) -> tuple[float, float, collections.Counter[str]]:
    """Arithmetic instructions per weight, those of the codes alone, and all opcodes."""
    opcodes = collections.Counter(block(bits, decode, clang))
    weights = UNROLL * 32
    arithmetic = sum(n for name, n in opcodes.items() if name not in FREE)
    codes = sum(opcodes[name] for name in ("and", "or", "lshr", "shl", "fadd", "fsub", "uitofp", "call"))
    return arithmetic / weights, codes / weights, opcodes


def clang_path() -> str | None:
    return shutil.which("clang-14") or shutil.which("clang")


def main() -> None:
    clang = clang_path()
    if clang is None:
        raise SystemExit("no clang (Debian's package is clang-14)")
    print("| bits | decode | arithmetic per weight | of which codes | opcodes of two channels, 64 weights |")
    print("|---|---|---|---|---|")
    for bits in layout.BITS:
        for decode, name in DECODES.items():
            total, codes, opcodes = per_weight(bits, decode, clang)
            words = ", ".join(f"{name} {n}" for name, n in opcodes.most_common())
            print(f"| {bits} | {name} | {total:.2f} | {codes:.2f} | {words} |")


if __name__ == "__main__":
    main()
