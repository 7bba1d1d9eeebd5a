"""Instructions per weight of sparse_gemv.metal's inner loop, in LLVM IR and in PTX.

Contract: at 4 bits at most three, and a planted one more is counted. Three is the aim of metal/README.md,
"Work per weight", where the measured counts stand.
"""

import os

import mlx.core as mx
import pytest

from spqt_cli.backends.gpu import compensate
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


@pytest.fixture(scope="module")
def clang():
    found = count_instructions.clang_path()
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no clang: instructions were not counted (Debian's package is clang-14)")
        pytest.skip("no clang (Debian's package is clang-14)")
    return found


@pytest.mark.parametrize("decode", [1, 2])
def test_three_instructions_a_weight_in_llvm_ir(clang, decode):
    counts = ir_counts(count_instructions.ir(4, decode, clang))
    assert count_instructions.weights(counts) == 64  # the loop was found: two channels of 32 outputs
    assert arithmetic(counts) <= 3.0
    assert counts["others"] == 0


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
