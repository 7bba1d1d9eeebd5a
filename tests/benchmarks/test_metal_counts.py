"""Counts of the Metal kernels: memory lines, threadgroup memory, registers, launches.

Contract: with half of the channels active every launch of every Llama shape reads at most 54 % of the
row-grouped form's lines; the sizes worked out are those that the compiler lays out.
"""

import re

import pytest

from spqt_cli.backends.gpu import geometry
from tests.metal import count_instructions, count_registers

metal_counts = pytest.importorskip("benchmarks.metal_counts", reason="benchmarks/ is not in a source archive")
LLAMAS = ["llama-3.2-1b", "llama-3.2-3b", "llama-3-8b", "llama-3-70b", "llama-2-7b", "llama-2-13b"]


@pytest.mark.parametrize("shape", LLAMAS)
def test_half_of_the_channels_are_hardly_more_than_half_of_the_lines(shape):
    for sizes in metal_counts.units(shape):
        for seed in range(3):
            assert 0.499 < metal_counts.line_share(sizes, seed) <= metal_counts.MOST_LINES, sizes


def test_threadgroup_memory_is_what_the_compiler_lays_out(clang):
    text = count_instructions.ir(4, geometry.HALVES, clang)
    struct = re.search(r"%struct\.GemvMemory = type \{(.*?)\}", text)[1]
    sizes = {"<2 x i32>": 8, "i32": 4, "float": 4}
    arrays = re.findall(r"\[(\d+) x (<2 x i32>|i32|float)\]", struct)
    assert len(arrays) == 4
    cut = geometry.Geometry(32, 4, 32, 2, 128, 4, geometry.HALVES, 1000)  # as count_instructions.ir has it
    laid_out = sum(int(count) * sizes[kind] for count, kind in arrays)
    assert laid_out == metal_counts.threadgroup_bytes(cut, normed=False)


@pytest.mark.parametrize("kind", metal_counts.CLASSES)
def test_every_launch_fits_a_threadgroup(kind):
    for shape in LLAMAS:
        for sizes in metal_counts.units(shape):
            assert metal_counts.threadgroup_bytes(metal_counts.cut_of(sizes, kind), normed=True) <= 32768


@pytest.mark.parametrize("decode", [geometry.HALVES, geometry.CONVERT])
def test_the_loop_leaves_registers_for_two_threadgroups(clang, decode):
    """Of 384 threads, on an Apple GPU whose core has 208 KB of registers: 69 of 32 bits each."""
    assert count_registers.live(count_instructions.ir(4, decode, clang)) <= 69


LOOP = """
define void @kernel() {
  %1 = fadd float 1.0, 2.0
  %8 = bitcast i64 0 to i64
  br label %start
start:
  %2 = phi float [ 0.0, %0 ], [ %6, %start ]
  %3 = load <4 x i32>, <4 x i32> addrspace(1)* null
  %4 = extractelement <4 x i32> %3, i64 0
  %5 = bitcast i32 %4 to float
  %6 = call float @_Z3fmafff(float %5, float %1, float %2)
  %7 = trunc i64 %8 to i1
  br i1 %7, label %start, label %end
end:
  ret void
}
"""


def test_values_are_counted_while_they_are_alive():
    # at the load: %1, %8 (two registers), the sum, and four of the load
    assert count_registers.live(LOOP) == 1 + 2 + 1 + 4


def test_a_block_takes_eleven_launches():
    assert metal_counts.launches("llama-3-8b", "g") == 11
