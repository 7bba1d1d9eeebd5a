"""Counts the instructions per weight in the kernel's inner loop, in LLVM IR and in PTX.

    python -m tests.metal.count_instructions              # clang's LLVM IR and PTX
    python -m tests.metal.count_instructions kernel.ptx   # PTX from elsewhere, such as NVRTC's

The loop is every block on a way from the one with the most multiply-adds back to itself, without those of
the loop around it. Arithmetic is what works on codes, scales and x. Memory, addresses (with the walk
through the list of channels) and control stand apart: some GPUs do them in slots of their own. Moves give a
register another name or type and cost nothing.
"""

import argparse
import itertools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from spqt_cli.backends import problems
from spqt_cli.backends.gpu import geometry, kernel_text
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.format import layout
from tests.metal.emulator import clang_text, metal_text

SHIMS = Path(__file__).parent / "emulator"
CLANGS = ("clang-14", "clang-15", "clang-16", "clang-17", "clang-18", "clang-19", "clang")
DECODES = {0: "exponent and subtract", 1: "convert", 2: "subnormal", 3: "subnormal halves"}
CUDA_TYPES = {
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
    mx.uint32: "uint32_t",
    mx.uint8: "uint8_t",
}
# What an instruction is for; the first pattern that fits names it. Apple's arithmetic takes either half of a
# register as an operand, so that fpext, and taking a half out of a word, are moves there; CUDA's does not.
IR_CLASSES = {
    "multiply-adds": r"call .*@_Z3fmafff\(",
    "codes": r"(and|or|xor|shl|lshr|ashr|fadd|fsub|uitofp)\b",
    "scales and x": r"(fmul|fptrunc)\b",
    "addresses": r"(getelementptr|zext|sext|trunc|add|sub|mul)\b|call .*@_Z3min",
    "control": r"(br|icmp|fcmp|select)\b",
    "memory": r"(load|store)\b",
    "moves": r"(phi|bitcast|fpext|extractelement)\b",
}
PTX_CLASSES = {
    "multiply-adds": r"fma\.rn\.f32",
    "addresses": r"\S*64\b|(mul|mad)\.(wide|lo)|(add|sub|min)\.[su]32|cvt\.u32\.u16",
    "codes": r"(and|or|xor|not|shl|shr|shf|prmt|lop3|bfe|bfi)\.|cvt\.rn\.f32\.u32|(add|sub)(\.rn)?\.f32",
    "scales and x": r"cvt\.f32\.|mul(\.rn)?\.f32",
    "control": r"bra\b|setp|selp",
    "memory": r"(ld|st)\.",
    "moves": r"mov\.",
}
CLASSES = (*IR_CLASSES, "others")
ARITHMETIC = ("multiply-adds", "codes", "scales and x", "others")
FREE = ("memory", "moves")

Counts = dict[str, int]  # instructions of the loop by class


def problem(cut: geometry.Geometry, bits: int) -> tuple[launching.Launch, list[mx.array]]:
    """A launch of the kernel, float16, group 64, and its inputs."""
    case = problems.Case((cut.tile,), 100, bits)
    (matrix,) = problems.matrices(case)
    x = problems.vector(case)
    plan = launching.make_plan(x.shape, x.dtype, [matrix], cut, launching.Form())
    assert plan.gemv is not None
    return plan.gemv, plan.first_inputs(x)


def clang_path() -> str | None:
    return next(filter(None, map(shutil.which, CLANGS)), None)


def compiled(clang: str, flags: Sequence[str], text: str, suffix: str) -> str:
    """What clang makes of a text."""
    with tempfile.TemporaryDirectory() as folder:
        unit = Path(folder) / f"kernel.{suffix}"
        unit.write_text(text)
        command = [clang, *flags, "-O2", "-w", "-S", "-o", "-", str(unit)]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def ir(bits: int, decode: int, clang: str) -> str:
    """LLVM IR of the Metal text as Metal's rule has it: two channels a turn."""
    launch, inputs = problem(geometry.Geometry(32, 4, 32, 2, 128, 4, decode, 1000), bits)
    text = f'#include "{SHIMS / "shim_clang.h"}"\n{clang_text(metal_text(launch, inputs))}'
    flags = ["--target=aarch64-linux-gnu", "-std=c++14", "-ffreestanding", "-emit-llvm"]
    # A load of 16 bytes is one instruction of Apple's; this pass would cut it into four.
    flags += ["-fno-vectorize", "-fno-slp-vectorize", "-mllvm", "-disable-vector-combine"]
    return compiled(clang, flags, text, "cpp")


def cuda_text(launch: launching.Launch, inputs: Sequence[mx.array], headers: str) -> str:
    """A kernel as `mx.fast.cuda_kernel` has it compiled, without its namespace.

    headers: what stands for CUDA's own. MLX writes a head of plain pointers, checked with its 0.32.4.
    """
    kernel = launch.kernel
    parameters = [
        f"const {CUDA_TYPES[one.dtype]}* {name}" for name, one in zip(kernel.inputs, inputs, strict=True)
    ]
    parameters += [
        f"{CUDA_TYPES[dtype]}* {name}" for name, dtype in zip(kernel.outputs, launch.dtypes, strict=True)
    ]
    body, header = kernel_text.cuda(kernel)
    head = f'extern "C" __global__ void kernel({", ".join(parameters)})'
    return f"{headers}\n{header}\n{head} {{\n{body}\n}}\n"


def ptx(launch: launching.Launch, inputs: Sequence[mx.array], clang: str) -> str:
    """A kernel's PTX by clang, for compute capability 8.6, the newest that clang 14 knows."""
    every = "#pragma clang force_cuda_host_device"  # helpers are for the device, as MLX's NVRTC flag says
    text = cuda_text(launch, inputs, f'#include "{SHIMS / "shim_clang_cuda.h"}"\n{every} begin')
    flags = ["-x", "cuda", "--cuda-device-only", "--cuda-gpu-arch=sm_86", "-nocudainc", "-nocudalib"]
    flags += ["-Xclang", "-target-feature", "-Xclang", "+ptx71", "-std=c++17"]
    return compiled(clang, flags, f"{text}{every} end\n", "cu")


def cuda_problem(bits: int, decode: int) -> tuple[launching.Launch, list[mx.array]]:
    """A launch of the sparse product by CUDA's rule of geometry."""
    return problem(geometry.choose("cuda", [(4096, 1)], 4096)._replace(decode=decode), bits)


def gemv_ptx(bits: int, decode: int, clang: str) -> str:
    """The sparse product's PTX."""
    return ptx(*cuda_problem(bits, decode), clang)


def ir_counts(text: str) -> Counts:
    """The instructions of the inner loop in LLVM IR."""
    loop = halves_moved(inner_loop(text, "@_Z3fmafff(", "threadgroup_barrier"))
    return classified(re.findall(r"^\s+(?:%\S+ = )?(?:tail )?([a-z][^\n]*)", loop, re.M), IR_CLASSES)


def halves_moved(loop: str) -> str:
    """The loop with moves in the place of what takes a half of a 32-bit register, or the low byte of one.

    That is a trunc, behind a shift by 16 that nothing else uses: both halves of Apple's registers have names
    of their own, and its conversion takes bytes of them.
    """
    upper = re.compile(r"(%\S+) = lshr i32 (%\S+), 16$", re.M)
    for name in [found[1] for found in upper.finditer(loop)]:
        uses = re.findall(rf"^.*{re.escape(name)}\b(?! =).*$", loop, re.M)
        if all(re.search(rf"= trunc i32 {re.escape(name)} to i(16|8)$", one) for one in uses):
            loop = loop.replace(f"{name} = lshr ", f"{name} = bitcast ")
    return re.sub(r"= trunc (i32 %\S+ to i(16|8))$", r"= bitcast \1", loop, flags=re.M)


def ptx_counts(text: str) -> Counts:
    """The instructions of the inner loop in PTX."""
    loop = inner_loop(text, "fma.rn.f32", "bar.sync")
    return classified(re.findall(r"^[\s{]*(?:@!?%p\d+\s+)?([a-z][\w.]*)\s[^;]*;", loop, re.M), PTX_CLASSES)


def classified(instructions: Sequence[str], classes: dict[str, str]) -> Counts:
    counts = dict.fromkeys(CLASSES, 0)
    for one in instructions:
        counts[next((name for name, pattern in classes.items() if re.match(pattern, one)), "others")] += 1
    return counts


def inner_loop(text: str, multiply: str, barrier: str) -> str:
    """The blocks of the loop with the most `multiply`s, in LLVM IR or PTX.

    It is all that lies on a way from the busiest block back to itself without a barrier: the loop around
    it, which collects channels, has some.
    """
    blocks, ways = control_flow(max(re.split(r"^\}", text, flags=re.M), key=lambda one: one.count(multiply)))
    busiest = max(blocks, key=lambda label: blocks[label].count(multiply))
    back: dict[str, list[str]] = {label: [] for label in blocks}
    for label, following in ways.items():
        for other in following:
            back[other].append(label)
    closed = {label for label, body in blocks.items() if barrier in body}
    loop = reached(busiest, ways, closed) & reached(busiest, back, closed)
    return "\n".join(body for label, body in blocks.items() if label in loop)


def control_flow(function: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The basic blocks of a function by label, in order, and the labels that each can go on to."""
    number = itertools.count()  # PTX gives no label to what follows a branch not taken
    function = re.sub(
        r"@!?%p\d+\s+bra\b[^;]*;", lambda found: f"{found[0]}\nnot_taken{next(number)}:", function
    )
    parts = re.split(r"^\s*\$?(\w+):(?!:)", re.sub(r"//[^\n]*", "", function), flags=re.M)
    blocks = {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))
    labels, ways = list(blocks), {}
    for label, following in zip(labels, [*labels[1:], ""], strict=True):
        body = blocks[label].rstrip()
        targets = re.findall(r"(?:label %|bra(?:\.uni)?\s+\$?)(\w+)", body)
        ways[label] = [target for target in targets if target in blocks]
        if following and not re.match(r"\s*(br|switch|ret|bra|bra\.uni)\b", body.split("\n")[-1]):
            ways[label].append(following)  # PTX falls through; LLVM IR never does
    return blocks, ways


def reached(start: str, ways: dict[str, list[str]], closed: set[str]) -> set[str]:
    """All blocks that can be reached from one, itself included, without entering a closed one."""
    found, waiting = {start}, [start]
    while waiting:
        for label in ways[waiting.pop()]:
            if label not in found and label not in closed:
                found.add(label)
                waiting.append(label)
    return found


def weights(counts: Counts) -> int:
    """Weights that one turn of the loop multiplies: lanes have 32 each, further multiply-adds are biases."""
    return max(1, counts["multiply-adds"] // 32 * 32)


def arithmetic(counts: Counts) -> float:
    """Instructions per weight that work on codes, scales and x."""
    return sum(counts[name] for name in ARITHMETIC) / weights(counts)


def everything(counts: Counts) -> float:
    """Instructions per weight but loads, stores and moves."""
    return sum(n for name, n in counts.items() if name not in FREE) / weights(counts)


def head() -> str:
    return (
        f"| code | arithmetic | with addresses, control | {' | '.join(CLASSES)} | weights a turn |\n"
        f"|---{'|---' * (len(CLASSES) + 3)}|"
    )


def row(name: str, counts: Counts) -> str:
    """One line of the table, per weight."""
    shares = " | ".join(f"{counts[one] / weights(counts):.2f}" for one in CLASSES)
    sums = f"**{arithmetic(counts):.2f}** | {everything(counts):.2f}"
    return f"| {name} | {sums} | {shares} | {weights(counts)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ptx", nargs="*", type=Path, help="PTX files to count instead")
    files = parser.parse_args().ptx
    clang = clang_path()
    if clang is None and not files:
        raise SystemExit("no clang (Debian's package is clang-14)")
    print(head())
    for file in files:
        print(row(file.name, ptx_counts(file.read_text())))
    if files or clang is None:
        return
    for bits in layout.BITS:
        for decode, name in DECODES.items():
            print(row(f"{bits} bits, {name}, LLVM IR", ir_counts(ir(bits, decode, clang))))
            print(row(f"{bits} bits, {name}, PTX", ptx_counts(gemv_ptx(bits, decode, clang))))


if __name__ == "__main__":
    main()
