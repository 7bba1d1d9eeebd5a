"""The check of each GPU kernel before its first use, and the self-test.

Contract: a kernel with a planted fault is never used, is told once, and MLX's matmul takes over; a right one
is checked once per machine. The bound is accuracy.py's, derived in metal/README.md; it is not widened here.
"""

import itertools

import mlx.core as mx
import pytest

from spqt_cli.backends import accuracy, interface, problems, select, selftest, stock
from spqt_cli.backends.gpu import backend as gpu
from spqt_cli.backends.gpu import first_use, geometry, kernel_text, plans, ways
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.backends.problems import Case
from tests.backends.gpu.test_kernels import CUTS, use
from tests.lib.backends import EMULATED
from tests.metal.emulator import emulate


@pytest.fixture
def fresh_trust(monkeypatch, tmp_path):
    """No verdicts, kept or remembered, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(first_use, "_refused", {})
    first_use._passed.cache_clear()
    yield
    first_use._passed.cache_clear()


def run_emulated(launch, inputs):
    return emulate(launch, inputs).outputs


def planted(monkeypatch, old, new):
    """The kernel body with one change."""
    real = kernel_text.body
    assert old in real("sparse_gemv.metal") + real("sparse_experts.metal")
    monkeypatch.setattr(kernel_text, "body", lambda name: real(name).replace(old, new))


WRONG_BODIES = [
    ("sums[c] = fma(code,", "sums[c] = 2.0f * fma(code,", "a GPU kernel is wrong"),
    ("kept |= 1u << e;", "kept |= no_such_name;", "a kernel does not run"),
]


@pytest.mark.parametrize(("old", "new", "reason"), WRONG_BODIES)
def test_fault_46_wrong_kernel_leads_to_the_stock_path(monkeypatch, fresh_trust, capfd, old, new, reason):
    monkeypatch.setattr(launching, "run", run_emulated)
    use(monkeypatch, CUTS["narrow"])
    planted(monkeypatch, old, new)
    case = Case((128,), 96)
    some = problems.matrices(case)
    x = problems.vector(case)
    for _ in range(2):
        (y,), active = gpu.sparse_gemv(x, some)
        (expected,), _ = stock.sparse_gemv(x, some)
        assert mx.array_equal(y, expected).item()
        assert active.item() == 48
    told = capfd.readouterr().err
    assert told.count("\n") == 1
    assert reason in told
    assert "spqt doctor --selftest" in told


def test_right_kernel_is_checked_once_per_machine(monkeypatch, fresh_trust):
    launches = []

    def run(launch, inputs):
        launches.append(launch)
        return run_emulated(launch, inputs)

    monkeypatch.setattr(launching, "run", run)
    use(monkeypatch, CUTS["narrow"])
    case = Case((128,), 96)
    x = problems.vector(case)
    gpu.sparse_gemv(x, problems.matrices(case))
    assert len(launches) == 3  # twice to check, once for the caller
    first_use._passed.cache_clear()  # as a new process would
    gpu.sparse_gemv(x, problems.matrices(case))
    assert len(launches) == 4


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("norm[k]", "norm[0]"),
        ("+ launch.eps", ""),
        ("squares += memory.square_sum[g]", "squares = memory.square_sum[g]"),
        ("T(float(x[k]) * factor)", "T(float(x[k]))"),
    ],
)
def test_a_wrong_norm_is_found_on_first_use(monkeypatch, fresh_trust, capfd, old, new):
    case = Case((128,), 301, dtype=mx.bfloat16)
    some, norm = problems.matrices(case), interface.Norm(mx.ones((301,), mx.bfloat16), 1e-5)
    monkeypatch.setattr(launching, "run", run_emulated)
    use(monkeypatch, CUTS["narrow"])
    form, x = launching.Form(norm=norm), problems.vector(case)
    assert plans.of_row(x, some, form).gemv is not None
    first_use._passed.cache_clear()
    planted(monkeypatch, old, new)
    assert plans.of_row(x, problems.matrices(case), form).gemv is None
    assert "a GPU kernel is wrong" in capfd.readouterr().err


def test_selftest_table_sees_a_wrong_backend(monkeypatch):
    cases = [
        ("one launch", Case((64,), 40, dtype=mx.float32)),
        ("fused", Case((64, 64), 40, dtype=mx.float32)),
    ]
    monkeypatch.setattr(selftest, "_cases", lambda: cases)
    monkeypatch.setattr("spqt_cli.backends.select.sparse_gemv", stock.sparse_gemv)
    assert all(row["pass"] for row in selftest.run())

    def wrong(x, some):
        ys, active = stock.sparse_gemv(x, some)
        return [y + 1 for y in ys], active

    monkeypatch.setattr("spqt_cli.backends.select.sparse_gemv", wrong)
    assert not any(row["pass"] for row in selftest.run() if "dense" not in row["kernel"])


def test_selftest_is_shared_by_processes_where_kernels_compile_slowly(monkeypatch):
    alone = [check() for check in selftest._checks()[:3]]
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(selftest.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(selftest, "_checks", lambda: [None] * 3)  # those of the workers count
    assert list(selftest.run()) == alone


class Everything(dict):
    """Every kernel was found wrong before."""

    def __contains__(self, key):
        return True

    def get(self, key, default=None):
        return "found wrong before"


@pytest.mark.parametrize(("old", "new"), [(fault[0], fault[1]) for fault in WRONG_BODIES])
def test_selftest_table_shows_a_kernel_that_was_given_up(monkeypatch, fresh_trust, old, new):
    monkeypatch.setattr(first_use, "_refused", Everything())
    monkeypatch.setattr(launching, "run", run_emulated)
    monkeypatch.setattr(select, "backend", lambda: EMULATED)
    monkeypatch.setattr(selftest, "_cases", lambda: [("one launch", Case((128,), 96))])
    for checks in ("_reduction_checks", "_experts_checks", "_more_rows_checks", "_dense_checks"):
        monkeypatch.setattr(selftest, checks, list)
    use(monkeypatch, CUTS["narrow"])
    planted(monkeypatch, old, new)
    (row,) = selftest.run()
    assert not row["pass"]


@pytest.mark.parametrize("wrong", [False, True])
def test_selftest_table_judges_chosen_experts(monkeypatch, fresh_trust, wrong):
    if wrong:
        planted(monkeypatch, "ulong(expert) * bands", "ulong(0) * bands")
    monkeypatch.setattr(launching, "run", run_emulated)
    monkeypatch.setattr(select, "backend", lambda: EMULATED)
    rows = [check() for check in itertools.islice(selftest._experts_checks(), 4)]
    assert len(rows) == 4
    assert {row["pass"] for row in rows} == {not wrong}


@pytest.mark.parametrize("wrong", [False, True])
def test_selftest_table_judges_what_reductions_do_besides(monkeypatch, fresh_trust, wrong):
    if wrong:
        real = kernel_text.body
        monkeypatch.setattr(
            kernel_text, "body", lambda name: real(name).replace("+ float(residual", "- float(residual")
        )
    monkeypatch.setattr(launching, "run", run_emulated)
    monkeypatch.setattr(select, "backend", lambda: EMULATED)
    rows = [check() for check in selftest._reduction_checks()]
    assert len(rows) == 9
    assert [row["kernel"] for row in rows if not row["pass"]] == (["residual"] * 3 if wrong else [])


ROWS_CUT = geometry.RowsGeometry(4, 16, 8, 8, 2, 256, 8, 0, 1000)
MATRIX_CUT = geometry.MatrixGeometry(16, 8, 32, 1, 64, 2, 4, 1000)
GEMM_CUT = geometry.GemmGeometry(64, 128, 32, 64, 32, 2, 3, 1000)


WRONG_ROWS = [
    ("few", "sums[t][c] = fma(code,", "sums[t][c] = 2.0f * fma(code,", "error"),
    ("few", "uint(t) < tokens)", "uint(t) < 1)", "error"),
    ("few", "? 0 : 1;", "? 0 : 2;", "wrong number of active channels"),
    ("matrix", "8 * j + group_lane) * STRIDE", "group_lane) * STRIDE", "error"),
    ("matrix", "a.y = weight_pair(", "a.y = no_such_name(", "a kernel does not run"),
    ("gemm", "(2 * part)", "0", "error"),
    ("gemm", "read.at[i] = *(const device uint4*)(row + k)", "read.at[i] = {}", "error"),
]


@pytest.mark.parametrize(("way", "old", "new", "reason"), WRONG_ROWS)
def test_a_wrong_kernel_for_more_rows_is_never_used(
    *, monkeypatch, fresh_trust, capfd, way, old, new, reason
):
    monkeypatch.setattr(launching, "run", run_emulated)
    monkeypatch.setattr(ways, "best", lambda *_: "few" if way == "few" else "matrix")
    monkeypatch.setattr(geometry, "choose_rows", lambda *_: ROWS_CUT)
    monkeypatch.setattr(geometry, "choose_matrix", lambda *_: GEMM_CUT if way == "gemm" else MATRIX_CUT)
    case = Case((128,), 96)
    x = problems.rows(case, 3)

    def told():
        some = problems.matrices(case)
        found = gpu.sparse_rows(x, some)
        assert accuracy.judge_rows(x, some, found, found, rounded=True).passed
        return capfd.readouterr().err

    assert told() == ""
    real = kernel_text.body
    assert any(old in real(f"{name}_rows.metal") for name in ("sparse", "matrix", "gemm"))
    first_use._passed.cache_clear()
    monkeypatch.setattr(kernel_text, "body", lambda file: real(file).replace(old, new))
    words = told()
    assert words.count("\n") == 1
    assert reason in words
    assert told() == ""  # once is enough


def test_right_kernels_for_more_rows_are_checked_once_per_machine(monkeypatch, fresh_trust):
    launches = []

    def run(launch, inputs):
        launches.append(launch)
        return run_emulated(launch, inputs)

    monkeypatch.setattr(launching, "run", run)
    monkeypatch.setattr(ways, "best", lambda *_: "few")
    monkeypatch.setattr(geometry, "choose_rows", lambda *_: ROWS_CUT)
    case = Case((128,), 96)
    x = problems.rows(case, 3)
    gpu.sparse_rows(x, problems.matrices(case))
    assert len(launches) == 3  # twice to check, once for the caller
    first_use._passed.cache_clear()  # as a new process would
    gpu.sparse_rows(x, problems.matrices(case))
    assert len(launches) == 4


@pytest.mark.parametrize("wrong", [False, True])
def test_selftest_table_judges_kernels_for_more_rows(monkeypatch, fresh_trust, wrong):
    if wrong:
        real = kernel_text.body
        monkeypatch.setattr(
            kernel_text, "body", lambda name: real(name).replace("sum += here[stripe", "sum = here[stripe")
        )
    monkeypatch.setattr(launching, "run", run_emulated)
    monkeypatch.setattr(select, "backend", lambda: EMULATED)
    monkeypatch.setattr(ways, "is_possible", lambda way, count, dtype: count < 32 and dtype == mx.float16)
    monkeypatch.setattr(plans, "device_class", lambda: "g")
    monkeypatch.setitem(geometry.MANY_ROWS, 16, (8, 32, 1, 64, 2, 4))
    rows = [check() for check in selftest._more_rows_checks()]
    assert [row["kernel"] for row in rows[:2]] == ["2 rows, few", "2 rows, stripes, few"]
    assert [row["kernel"] for row in rows[6:8]] == ["8 rows, matrix", "8 rows, stripes, matrix"]
    assert len(rows) == 10
    assert [row["pass"] for row in rows] == [not (wrong and "stripes" in row["kernel"]) for row in rows]
