"""The emulator itself: faults planted in small kernels and in sparse_gemv.metal are reported.

Contract: each kind of fault (bounds, alignment, races, reads before writes, divergence, outputs unwritten or
written twice) gives its own report; a right kernel gives none. Results of right kernels are compared exactly.
"""

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.backends import problems
from spqt_cli.backends.gpu import backend as gpu
from spqt_cli.backends.gpu import first_use, geometry, kernel_text
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.backends.gpu.kernel_text import Kernel
from spqt_cli.backends.gpu.launch import Launch
from tests.metal.emulator import emulate

THREADS = 64
X = mx.arange(THREADS, dtype=mx.float32)
REVERSE = """
const uint lane = thread_position_in_threadgroup.x;
threadgroup float shared[64];
shared[lane] = x[lane];
threadgroup_barrier(mem_flags::mem_threadgroup);
y[threadgroup_position_in_grid.x * 64 + lane] = shared[63 - lane];
"""


def emulated(source, *, groups=1, inputs=(X,), outputs=None, dtype=mx.float32):
    names = tuple("xzw"[: len(inputs)])
    kernel = Kernel("planted", names, ("y",), (), (), "", source, THREADS)
    return emulate(Launch(kernel, (groups, 1), [(outputs or groups * THREADS,)], [dtype]), inputs)


def test_right_kernel_is_not_blamed():
    found = emulated(REVERSE, groups=2)
    assert found.reports == []
    assert np.array_equal(np.array(found.outputs[0]), np.tile(np.arange(63, -1, -1), 2))


@pytest.mark.parametrize(
    ("old", "new", "report"),
    [
        ("x[lane]", "x[lane + 1]", "out of bounds: read of 4 bytes at byte 256 of 'x', which has 256"),
        ("x[lane]", "x[int(lane) - 1]", "out of bounds"),
        ("y[thread", "y[1 + thread", "out of bounds: write of 4 bytes at byte 256 of 'y'"),
        ("shared[63 - lane]", "shared[64 - lane]", "out of bounds: index 64 of a threadgroup array of 64"),
        ("threadgroup_barrier(mem_flags::mem_threadgroup);", "", "race"),
        ("shared[lane] = x[lane];", "if (lane < 63) shared[lane] = x[lane];", "uninitialised read"),
        ("shared[lane] = x[lane];", "shared[lane / 2] = x[lane];", "race"),
        ("y[thread", "if (lane < 60) y[thread", "16 of 256 bytes of 'y' were never written"),
        ("* 64 + lane]", "* 64 + lane / 2]", "two threads write 'y'"),
        ("threadgroup_barrier", "if (lane < 32) threadgroup_barrier", "divergence"),
        ("y[thread", "((device float*)x)[lane] = 0.0f; y[thread", "write to the input 'x'"),
    ],
)
def test_planted_fault_is_reported(old, new, report):
    assert old in REVERSE
    assert any(report in line for line in emulated(REVERSE.replace(old, new)).reports)


def test_two_threadgroups_writing_one_place_are_reported():
    source = REVERSE.replace("threadgroup_position_in_grid.x * 64 + lane", "lane")
    assert any("two threads write" in line for line in emulated(source, groups=2, outputs=64).reports)


def test_values_left_by_another_threadgroup_are_uninitialised():
    source = REVERSE.replace("shared[lane] =", "if (threadgroup_position_in_grid.x == 0) shared[lane] =")
    assert any("uninitialised read" in line for line in emulated(source, groups=2).reports)


def test_simdgroup_operation_in_a_branch_is_reported():
    source = (
        "const uint lane = thread_position_in_threadgroup.x;\nfloat v = x[lane];\n"
        "if (lane % 2 == 0) v = simd_shuffle_xor(v, ushort(2));\ny[lane] = v;"
    )
    assert any("divergence" in line for line in emulated(source).reports)


def test_simdgroup_operations_compute_what_metal_says():
    source = (
        "const uint lane = thread_position_in_threadgroup.x;\n"
        "const uint before = simd_prefix_exclusive_sum(lane % 3);\n"
        "y[lane] = float(before) + 1000.0f * simd_shuffle_xor(x[lane], ushort(5));"
    )
    lanes = np.arange(THREADS)
    parts = [np.concatenate([[0], np.cumsum(one)[:-1]]) for one in np.split(lanes % 3, 2)]
    expected = np.concatenate(parts) + 1000.0 * (lanes ^ 5)
    assert np.array_equal(np.array(emulated(source).outputs[0]), expected)


def test_misaligned_wide_load_is_reported():
    x = mx.arange(THREADS * 4 + 4, dtype=mx.uint32)
    source = (
        "const uint lane = thread_position_in_threadgroup.x;\n"
        "y[lane] = float(*(const device uint64_t*)(x + 2 * lane + 1));"
    )
    assert any("misaligned" in line for line in emulated(source, inputs=(x,)).reports)


def test_lines_are_counted_once_per_launch_and_once_per_threadgroup():
    x = mx.zeros((1024,))  # 32 lines
    source = (
        "const uint lane = thread_position_in_threadgroup.x;\n"
        "y[threadgroup_position_in_grid.x * 64 + lane] = x[lane * 2] + x[lane];"
    )
    traffic = emulated(source, groups=3, inputs=(x,)).traffic
    assert traffic["x"].lines == 4
    assert traffic["x"].lines_summed == 12
    assert traffic["y"].written_bytes == 3 * 64 * 4


def test_bfloat16_rounds_to_nearest_even():
    values = mx.array(np.random.default_rng(0).normal(size=THREADS).astype(np.float32))
    source = "const uint lane = thread_position_in_threadgroup.x;\ny[lane] = bfloat16_t(x[lane]);"
    (y,) = emulated(source, inputs=(values,), dtype=mx.bfloat16).outputs
    assert mx.array_equal(y, values.astype(mx.bfloat16)).item()


BODY_FAULTS = [  # an address is never what was not written: the emulator reports an access, and makes it
    ("as_type<float>(entry.y) : 0.0f", "as_type<float>(memory.list[place + ROWS].y) : 0.0f", "uninit"),
    ("memory.list[i] = last;", "memory.list[i].x = last.x;", "uninit"),
    ("memory.list[i] = last;", "memory.list[i] = memory.list[count - 1] = last;", "race"),
    ("offset[group_at + g]", "offset[group_at + g + 64]", "out of bounds"),
    ("total += count;", "total += count; memory.list[count].x = 0;", "race"),
    ("in_band < band && at < own.outputs", "in_band < band + 32", "out of bounds"),
    (
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n    }\n    const bool owns",
        "}\n    const bool owns",
        "race",
    ),
    ("threadgroup_barrier(mem_flags::mem_threadgroup);\n    uint rows =", "uint rows =", "race"),
]


@pytest.mark.parametrize(("old", "new", "report"), BODY_FAULTS, ids=[fault[2] for fault in BODY_FAULTS])
def test_fault_planted_in_the_real_body_is_reported(monkeypatch, old, new, report):
    reports = []
    body = kernel_text.body
    assert old in body("sparse_gemv.metal")
    monkeypatch.setattr(kernel_text, "body", lambda name: body(name).replace(old, new))

    def run(launch, inputs):
        emulation = emulate(launch, inputs)
        reports.extend(emulation.reports)
        return emulation.outputs

    monkeypatch.setattr(launching, "run", run)
    monkeypatch.setattr(first_use, "verdict", lambda *_, **__: "")
    cut = geometry.Geometry(32, 4, 32, 2, 128, 4, 0, 10000)
    monkeypatch.setattr(geometry, "choose", lambda *_: cut)
    case = problems.Case((120,), 100, group_size=32)
    gpu.sparse_gemv(problems.vector(case, 1.0), problems.matrices(case))
    assert any(report in line for line in reports), reports
