"""Instructions per weight of sparse_gemv.metal's inner loop, in LLVM IR and in PTX.

Contract: at 4 bits at most three, and a planted one more is counted. Three is the aim of metal/README.md,
"Work per weight", where the measured counts stand. As Metal has it a weight takes at most 1.41 instructions
that work on codes, and 2.6 in all, with either way to decode it.
"""

import mlx.core as mx
import pytest

from spqt_cli.backends import problems
from spqt_cli.backends.gpu import compensate, geometry, rows
from tests.metal import count_instructions
from tests.metal.count_instructions import arithmetic, everything, ir_counts, ptx_counts

LOOP = """
.entry kernel() {
 mov.u32 %r1, 0;
OUTER:
 bar.sync 0;
 setp.eq.s32 %p1, %r9, 0;
 @%p1 bra DONE;
INNER:
 ld.global.u32 %r2, [%rd1];
 and.b32 %r3, %r2, 15;
 @%p2 bra SKIP;
 add.s32 %r4, %r4, 1;
SKIP:
 WEIGHTS
 add.s64 %rd1, %rd1, 4;
 @%p3 bra INNER;
 bra.uni OUTER;
DONE:
 xor.b32 %r7, %r7, 1;
 ret;
}
"""
WEIGHTS = "fma.rn.f32 %f1, %f2, %f3, %f1;\n" * 32


@pytest.mark.parametrize("decode", [1, 2, 3])
def test_three_instructions_a_weight_in_llvm_ir(clang, decode):
    counts = ir_counts(count_instructions.ir(4, decode, clang))
    assert count_instructions.weights(counts) == 64  # the loop was found: two channels of 32 outputs
    assert arithmetic(counts) <= 3.0
    assert counts["others"] == 0


@pytest.mark.parametrize("decode", [geometry.HALVES, geometry.CONVERT])
def test_a_weight_on_metal_takes_few_instructions_on_codes_and_few_in_all(clang, decode):
    """Apple's GPUs do integer and float work one after the other, conversions slower."""
    counts = ir_counts(count_instructions.ir(4, decode, clang))
    assert counts["codes"] / count_instructions.weights(counts) <= 1.41
    assert everything(counts) <= 2.6


def test_half_codes_need_no_conversion(clang):
    loop = count_instructions.inner_loop(
        count_instructions.ir(4, geometry.HALVES, clang), "@_Z3fmafff(", "threadgroup_barrier"
    )
    assert "uitofp" not in loop
    assert loop.count(" and i32 ") == 32  # one mask for two of 64 codes


MOVES = """
  %1 = lshr i32 %0, 16
  %2 = trunc i32 %1 to i16
  %3 = trunc i32 %0 to i8
  %4 = lshr i32 %0, 16
  %5 = trunc i32 %4 to i16
  %6 = and i32 %4, 15
  %7 = lshr i32 %0, 8
  %8 = trunc i32 %7 to i16
  %9 = trunc i64 %7 to i32
"""


def test_taking_half_of_a_register_is_a_move_and_other_shifts_are_not():
    lines = count_instructions.halves_moved(MOVES).strip().split("\n")
    kinds = [line.split("= ")[1].split()[0] for line in lines]
    expected = ["bitcast", "bitcast", "bitcast", "lshr", "bitcast", "and", "lshr", "bitcast", "trunc"]
    assert kinds == expected


def test_three_instructions_a_weight_in_ptx_addresses_included(clang):
    counts = ptx_counts(count_instructions.gemv_ptx(4, 2, clang))
    assert count_instructions.weights(counts) == 128  # four channels
    assert everything(counts) <= 3.0
    assert counts["others"] == 0


def test_planted_instruction_is_counted(clang, monkeypatch):
    before = (
        ir_counts(count_instructions.ir(4, 1, clang)),
        ptx_counts(count_instructions.gemv_ptx(4, 2, clang)),
    )
    body = count_instructions.kernel_text.body("sparse_gemv.metal")
    line = "sums[c] = fma(code,"
    assert line in body
    planted = body.replace(line, "code = code - 3.0f; " + line)
    real = count_instructions.kernel_text.body
    for name in ("body", "_include"):  # what Metal gets, and CUDA
        monkeypatch.setattr(
            count_instructions.kernel_text,
            name,
            lambda file: planted if file == "sparse_gemv.metal" else real(file),
        )
    after = (
        ir_counts(count_instructions.ir(4, 1, clang)),
        ptx_counts(count_instructions.gemv_ptx(4, 2, clang)),
    )
    for one, other in zip(before, after, strict=True):
        assert arithmetic(other) == pytest.approx(arithmetic(one) + 1.0)


def test_every_block_of_the_inner_loop_and_none_of_the_outer():
    counts = ptx_counts(LOOP.replace("WEIGHTS", WEIGHTS))
    assert counts["multiply-adds"] == 32
    assert counts["codes"] == 1  # not the xor after the loop
    assert counts["addresses"] == 2  # the add that a branch may skip is one of them
    assert counts["memory"] == 1
    assert counts["control"] == 2  # not those of the loop around it
    assert counts["others"] == 0


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_rounding_compiles_for_cuda(clang, size, dtype):
    """Its error sums stay in shared memory and registers: nothing is spilled to local memory."""
    launch = compensate.spans(4, size, dtype, 2)
    whole, corner = mx.zeros((2, compensate.SPAN, size)), mx.zeros((compensate.SPAN, compensate.SPAN))
    text = count_instructions.ptx(launch, [whole, whole, corner], clang)
    assert "shfl.sync.bfly" in text
    assert ".local" not in text


FEW = [geometry.choose_rows("cuda", [(8192, 1)], 8192, number) for number in (2, 4, 8)]
MANY = [geometry.choose_matrix("cuda", [(8192, 1)], 8192, number, 4) for number in (8, 16, 32, 64, 128)]


@pytest.mark.parametrize("cut", [*FEW, *MANY], ids=lambda cut: f"{type(cut).__name__}-{cut.tokens}")
def test_more_rows_compile_for_cuda(clang, cut):
    """Sums stay in registers, and codes are unpacked once for all rows."""
    (matrix,) = problems.matrices(problems.Case((cut.tile,), 300, 4))
    plan = rows.make_plan(mx.float16, [matrix], cut._replace(stripe=128), dense=False)
    x = mx.zeros((1, cut.tokens, 300), mx.float16)
    launch, _ = rows._launches(x.shape, cut.tokens, plan)
    text = count_instructions.ptx(launch, [x, *plan.inputs, rows._count(cut.tokens)], clang)
    assert ".local" not in text
    if isinstance(cut, geometry.GemmGeometry):
        # Two loops, for x that can be copied and x that can't; unrolled twice, unless the compiler won't.
        tiles = cut.span // 16 * cut.simd_outputs // 16 * cut.simd_tokens // 8
        assert text.count("mma.sync") in (2 * tiles, 4 * tiles)
        loads = cut.span // 16 * (cut.simd_outputs + cut.simd_tokens) // 16
        assert text.count("ldmatrix") * tiles == text.count("mma.sync") * loads
        return
    if isinstance(cut, geometry.MatrixGeometry):
        loop = count_instructions.inner_loop(text, "mma.sync", "bar.sync")
        assert loop.count("mma.sync") == cut.unroll * cut.outputs // 2 * cut.tokens // 8
        return
    counts = ptx_counts(text)
    weights = cut.unroll * cut.outputs
    products = weights * cut.tokens
    assert products <= counts["multiply-adds"] <= 1.13 * products  # biases are the rest
    assert counts["codes"] / weights <= 1.3
