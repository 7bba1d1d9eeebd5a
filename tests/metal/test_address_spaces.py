"""The Metal files as C++14 with real address spaces: `device`, `constant`, `threadgroup` are types to clang.

Contract: each file of metal/ compiles behind its constants, and so does the whole text that MLX hands to
Metal; a planted pointer into the wrong space is refused. Where CI says so (CI=true) a missing clang fails;
elsewhere it skips.
"""

import itertools
import subprocess
from pathlib import Path

import mlx.core as mx
import pytest

from spqt_cli.backends import problems
from spqt_cli.backends.gpu import backend as gpu
from spqt_cli.backends.gpu import (
    compensate,
    dequantize,
    experts,
    first_use,
    geometry,
    kernel_text,
    mixture,
    rows,
)
from spqt_cli.backends.gpu import launch as launching
from tests.metal.emulator import clang_text, metal_text

WARNINGS = (
    "-Wall",
    "-Wdouble-promotion",
    "-Wc++17-extensions",
    "-Wno-unknown-attributes",
    "-Wno-unused",
    "-Werror",
)
SHIM = Path(__file__).parent / "emulator" / "shim_clang.h"
METAL = Path(__file__).parents[2] / "metal"


def refusals(clang, text, tmp_path):
    """clang's errors on a kernel's text; empty when it is accepted."""
    unit = tmp_path / "kernel.cpp"
    unit.write_text(f'#include "{SHIM}"\n{clang_text(text)}')
    # 64-bit Arm, whose `_Float16` every clang knows; nothing is linked or run.
    command = [
        clang,
        "--target=aarch64-linux-gnu",
        "-std=c++14",
        "-ffreestanding",
        "-fsyntax-only",
        *WARNINGS,
    ]
    done = subprocess.run([*command, str(unit)], capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""


def texts(monkeypatch, case, cut):
    """What MLX would compile for a call."""
    seen = []

    def run(launch, inputs):
        seen.append(metal_text(launch, inputs))
        return [
            mx.zeros(shape, dtype=dtype) for shape, dtype in zip(launch.shapes, launch.dtypes, strict=True)
        ]

    monkeypatch.setattr(launching, "run", run)
    monkeypatch.setattr(first_use, "verdict", lambda *_, **__: "")
    monkeypatch.setattr(geometry, "choose", lambda *_: cut)
    gpu.sparse_gemv(problems.vector(case), problems.matrices(case))
    return seen


def case_of(count, bits, dtype=mx.float16):
    return problems.Case((128,) * count, 100, bits, dtype=dtype, bias=True, per_channel=count > 1)


WIDE = geometry.Geometry(32, 32, 4, 2, 128, 8, 0, 50)
CODES = "const device uint32_t* codes = packed"
NARROW = geometry.Geometry(32, 4, 32, 2, 128, 4, 1, 1000)


@pytest.mark.parametrize(("cut", "count"), list(itertools.product((WIDE, NARROW), (1, 3))))
@pytest.mark.parametrize(
    "kind", [(3, mx.float16), (4, mx.float16), (6, mx.float16), (4, mx.bfloat16), (4, mx.float32)]
)
def test_bodies_keep_to_their_address_spaces(clang, monkeypatch, tmp_path, kind, cut, count):
    bits, dtype = kind
    found = texts(monkeypatch, case_of(count, bits, dtype), cut)
    assert ("bfloat16_t" in found[0]) == (dtype == mx.bfloat16)
    assert len(found) == (3 if cut is WIDE else 1)
    for text in found:
        assert refusals(clang, text, tmp_path) == ""


@pytest.mark.parametrize("pairs", [6, 8])  # of under eight indices the address space is another
@pytest.mark.parametrize("cut", [WIDE, NARROW])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_chosen_experts_keep_to_their_address_spaces(clang, tmp_path, dtype, cut, pairs):
    _, stacks = problems.experts(problems.Case((128, 128), 100, 4, dtype=dtype), 3)
    plan = experts.make_plan(dtype, stacks, cut._replace(stripe=100), pairs, pairs // 2)
    arrays = [mx.zeros((2, 100), dtype), *plan.inputs, mx.zeros((pairs,), mx.uint32), plan.form]
    assert refusals(clang, metal_text(plan.launch, arrays), tmp_path) == ""


@pytest.mark.parametrize("chosen", [2, 8])  # of under eight the address space is another
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_the_ends_of_a_mixture_keep_to_their_address_spaces(clang, tmp_path, dtype, chosen):
    x, logits, weights = mx.zeros((1, 1, 64), dtype), mx.zeros((16,), dtype), mx.zeros((chosen,))
    ends = mixture.ends(x, logits, chosen, of_all=False)
    assert refusals(clang, metal_text(ends.choose, [logits]), tmp_path) == ""
    arrays = [x, mx.zeros((chosen, 64), dtype), weights]
    assert refusals(clang, metal_text(ends.add, arrays), tmp_path) == ""


FEW = geometry.RowsGeometry(8, 8, 16, 8, 2, 256, 8, 1, 50)
MATRIX = geometry.MatrixGeometry(16, 8, 128, 2, 64, 2, 4, 50)
GEMM = geometry.GemmGeometry(64, 128, 32, 64, 32, 2, 4, 50)


def rows_plan(cut, count, bits=4, dtype=mx.float16):
    return rows.make_plan(dtype, problems.matrices(case_of(count, bits, dtype)), cut, dense=False)


WIDE_TYPES = [mx.float16, mx.bfloat16, mx.float32]  # the matrix unit takes the first two
KINDS = [
    *((cut, bits, dtype) for cut, bits in [(FEW, 3), (FEW._replace(tokens=2), 4)] for dtype in WIDE_TYPES),
    *(
        (cut, bits, dtype)
        for cut, bits in [(MATRIX, 5), (MATRIX, 8), (GEMM, 4), (GEMM, 6)]
        for dtype in WIDE_TYPES[:2]
    ),
]


@pytest.mark.parametrize("stripe", [50, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_keep_to_their_address_spaces(clang, monkeypatch, tmp_path, kind, stripe):
    cut, bits, dtype = kind
    plan = rows_plan(cut._replace(stripe=stripe), 1 if cut in (MATRIX, GEMM) else 2, bits, dtype)
    texts = []

    def run(launch, inputs):
        texts.append(metal_text(launch, inputs))
        return [mx.zeros(shape, kind) for shape, kind in zip(launch.shapes, launch.dtypes, strict=True)]

    monkeypatch.setattr(launching, "run", run)
    rows.launch(mx.zeros((1, 3, 100), dtype), plan)
    assert len(texts) == (2 if stripe == 50 else 1)
    for text in texts:
        assert refusals(clang, text, tmp_path) == ""


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("bits", [3, 4])
def test_dequantizing_keeps_to_its_address_spaces(clang, tmp_path, bits, dtype):
    plan = dequantize.make_plan(dtype, problems.matrices(case_of(1, bits, dtype))[0])
    assert refusals(clang, metal_text(plan.launch, plan.inputs), tmp_path) == ""


def kernels():
    """One kernel of each file of metal/, with what MLX is given for it."""
    case = case_of(2, 4)
    plan = launching.make_plan((1, 1, 100), mx.float16, problems.matrices(case), WIDE, launching.Form())
    spans = compensate.spans(4, 64, mx.float16, 1)
    whole = dequantize.make_plan(mx.float16, problems.matrices(case_of(1, 4))[0]).launch
    _, stacks = problems.experts(problems.Case((128,), 100), 2)
    chosen = experts.make_plan(mx.float16, stacks, WIDE._replace(stripe=100), 8, 2).launch
    ends = mixture.ends(mx.zeros((1, 1, 64), mx.float16), mx.zeros((16,), mx.float16), 8, of_all=True)
    assert ends is not None
    launches = (plan.gemv, plan.reduce, plan.counts, spans, whole, chosen, ends.choose, ends.add)
    every = [one.kernel for one in launches] + rows_plan(FEW, 2).kernels
    every += rows_plan(MATRIX, 1).kernels + rows_plan(GEMM, 1).kernels
    return {one.files[-1]: one for one in every}


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("size", [32, 128])
def test_rounding_keeps_to_its_address_spaces(clang, tmp_path, size, dtype):
    launch = compensate.spans(3, size, dtype, 2)
    whole, corner = mx.zeros((2, compensate.SPAN, size)), mx.zeros((compensate.SPAN, compensate.SPAN))
    assert refusals(clang, metal_text(launch, [whole, whole, corner]), tmp_path) == ""


@pytest.mark.parametrize("name", sorted(path.name for path in METAL.glob("*.metal")))
def test_each_file_compiles_alone_behind_its_constants(clang, tmp_path, name):
    """The file as it is in the repository, comments included, without the body that MLX wraps."""
    kernel = kernels()[name]
    head = kernel_text.declared(kernel) + "".join(map(kernel_text.body, kernel.files[:-1]))
    own = (METAL / name).read_text()
    assert refusals(clang, head + own, tmp_path) == ""
    assert refusals(clang, own, tmp_path) != ""  # so the constants count
    given = kernel_text.metal(kernel)[1]
    assert given == head + kernel_text.body(name)  # nothing else is put into the text


def test_nothing_is_defined_or_included_within_the_files():
    for path in METAL.glob("*.metal"):
        lines = [line.split()[0] for line in path.read_text().splitlines() if line.startswith("#")]
        assert set(lines) <= {"#pragma"}


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_the_gated_reduction_keeps_to_its_address_spaces(clang, monkeypatch, tmp_path, dtype):
    texts(monkeypatch, case_of(2, 4, dtype), WIDE)  # puts its stand-ins in place
    seen = []
    run = launching.run
    monkeypatch.setattr(
        launching, "run", lambda launch, inputs: seen.append((launch, inputs)) or run(launch, inputs)
    )
    case = case_of(2, 4, dtype)
    some = problems.matrices(case)
    mx.disable_compile()
    gpu.prepare_gated(
        problems.vector(case), some, problems.matrices(problems.Case((64,), 128, dtype=dtype))[0]
    )(problems.vector(case), None, None)
    mx.enable_compile()
    text = metal_text(*seen[1])
    assert " GLU = 1," in text
    assert refusals(clang, text, tmp_path) == ""


TURNED = kernel_text.Rotary(64, 48, traditional=False, rotated=2)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("then", ["residual", TURNED, TURNED._replace(dims=64, traditional=True)], ids=str)
def test_reductions_that_take_one_array_more_keep_to_their_address_spaces(clang, tmp_path, then, dtype):
    layers = problems.matrices(case_of(1 if then == "residual" else 3, 4, dtype))
    plan = launching.make_plan((1, 1, 100), dtype, layers, WIDE, launching.Form(then=then))
    other = mx.zeros((128,), dtype) if then == "residual" else mx.zeros((then.dims,))
    inputs = [mx.zeros(plan.gemv.shapes[0]), plan.inputs[0], other]
    text = metal_text(plan.reduce, inputs)
    assert f" ROTATED = {0 if then == 'residual' else 2}," in text
    assert refusals(clang, text, tmp_path) == ""


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_norms_keep_to_their_address_spaces(clang, tmp_path, dtype):
    case = case_of(3, 4, dtype)
    x, norm, _ = problems.before_norm(case)
    form = launching.Form(norm=norm)
    plan = launching.make_plan(x.shape, dtype, problems.matrices(case), NARROW, form)
    text = metal_text(plan.gemv, plan.first_inputs(x))
    assert " NORMED = 1," in text
    assert refusals(clang, text, tmp_path) == ""


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        # a threadgroup pointer where a device pointer is wanted, and the other way round
        (
            "const uint inputs =",
            "const device uint* wrong = memory.simdgroup_count;\nconst uint inputs =",
            "address_space(3)",
        ),
        (CODES, "threadgroup const uint32_t* codes = packed", "address_space(3)"),
        # losing the address space, which Metal does not allow for a pointer
        (CODES, "const uint32_t* codes = packed", "address_space(1)"),
        # a constant pointer passed as device
        ("inputs = launch.inputs;", "inputs = takes_constant(settings);", "takes_constant"),
        # min of a signed and an unsigned number is ambiguous in Metal
        ("min(stripe_first + launch.stripe, inputs)", "min(stripe_first + launch.stripe, 5)", "ambiguous"),
        # C++17
        ("if (BITS % 4 == 0)", "if constexpr (BITS % 4 == 0)", "C++17"),
        # double is no type of Metal's
        ("float factor = 1.0f;", "float factor = double(1.0f);", "double"),
    ],
)
def test_planted_wrong_address_space_is_refused(clang, monkeypatch, tmp_path, old, new, reason):
    (text,) = texts(monkeypatch, case_of(1, 4), NARROW)
    head = "inline uint takes_constant(const constant uint32_t* values) { return values[0]; }\n"
    assert old in text
    assert refusals(clang, head + text, tmp_path) == ""
    assert reason in refusals(clang, head + text.replace(old, new), tmp_path) != ""


def test_planted_pointer_to_another_16_bit_type_is_refused(clang, monkeypatch, tmp_path):
    (text,) = texts(monkeypatch, case_of(1, 4, mx.bfloat16), NARROW)
    old = "const device S* scale = (const device S*)"
    assert old in text
    assert refusals(clang, text, tmp_path) == ""
    assert "half" in refusals(
        clang, text.replace(old, "const device half* scale = (const device S*)"), tmp_path
    )
