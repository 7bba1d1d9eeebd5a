"""A kernel that the system refuses is done without, alone, and it is said.

Contract: results stay those of the definition; every other kernel stays in use; each refused kernel is told
in one line, once a process; the backend names them for as long as the process lives.
"""

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.backends import accuracy, problems, stock
from spqt_cli.backends.gpu import backend as gpu
from spqt_cli.backends.gpu import first_use, geometry, kernel_text, plans, ways
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.backends.problems import Case
from tests.backends.gpu.test_first_use import fresh_trust
from tests.backends.gpu.test_kernels import CUTS, use
from tests.metal.emulator import emulate

__all__ = ["fresh_trust"]  # a fixture
REFUSAL = "[metal::Device] Unable to load kernel"


@pytest.fixture
def refusing(monkeypatch, fresh_trust):
    """Returns (names, launches): kernels whose name has one of these don't start; all others are emulated."""
    names, launches = [], []

    def run(launch, inputs):
        if any(name in launch.kernel.name for name in names):
            raise RuntimeError(REFUSAL)
        launches.append(launch.kernel.name)
        return emulate(launch, inputs).outputs

    monkeypatch.setattr(launching, "run", run)
    monkeypatch.setattr(ways, "best", lambda *_: "few")
    mx.disable_compile()  # a traced array has no bytes that an emulator could read
    yield names, launches
    mx.enable_compile()


def assert_right(x, some):
    """Values and counts of the definition, whoever multiplied."""
    found = gpu.sparse_gemv(x, some)
    judged = accuracy.judge(x, some, found, found, rounded=True)
    assert judged.passed, judged.words()


def test_layers_of_a_refused_shared_launch_take_launches_of_their_own(refusing, monkeypatch, capfd):
    names, launches = refusing
    use(monkeypatch, CUTS["narrow"])
    names.append("gemv_2")
    case = Case((128, 64), 96)
    x, some = problems.vector(case), problems.matrices(case)
    assert_right(x, some)
    assert {name.split("_")[2] for name in launches} == {"1"}
    (told,) = capfd.readouterr().err.splitlines()
    assert REFUSAL in told
    assert "gemv_2" in told
    assert first_use.refused() == [told.removeprefix("spqt: ").split("; doing without")[0]]
    assert_right(x, some)  # is not tried or told again
    assert capfd.readouterr().err == ""


def test_other_kernels_stay_in_use(refusing, monkeypatch, capfd):
    names, launches = refusing
    use(monkeypatch, CUTS["narrow"])
    names.append("gemv_1")
    case = Case((128,), 96)
    (matrix,) = problems.matrices(case)
    assert_right(problems.vector(case), [matrix])
    assert launches == []  # MLX's own matmul
    x = problems.rows(case, 3)
    found = gpu.sparse_rows(x, [matrix])
    assert accuracy.judge_rows(x, [matrix], found, found).passed
    assert {name.split("_")[1] for name in launches} >= {"rows"}
    assert capfd.readouterr().err.count("\n") == 1


def test_a_refused_reduction_costs_only_what_it_does_besides(refusing, monkeypatch):
    """silu(gate) * up, and a residual sum, are then operations of MLX's; the products stay ours."""
    names, launches = refusing
    use(monkeypatch, CUTS["wide"])
    case = Case((128, 128), 301)
    gate, up = problems.matrices(case)
    x = problems.vector(case)
    glu = launching.make_plan(x.shape, x.dtype, [gate, up], CUTS["wide"], launching.Form(then="glu")).reduce
    names.append(glu.kernel.name)
    assert gpu.prepare_gated(x, [gate, up], gate) is None
    launches.clear()
    assert_right(x, [gate, up])
    assert {name.split("_")[1] for name in launches} == {"gemv", "reduce", "count"}
    assert len(first_use.refused()) == 1


def test_a_step_that_was_prepared_runs_without_the_kernel(refusing, monkeypatch):
    names, _ = refusing
    use(monkeypatch, CUTS["narrow"])
    names.append("gemv")
    case = Case((128,), 96)
    some, x = problems.matrices(case), problems.vector(case)
    (y,), counted = gpu.prepare(some)(x, mx.zeros((1,), mx.uint32))
    (expected,), active = stock.sparse_gemv(x, some)
    assert mx.array_equal(y, expected).item()
    assert np.array_equal(np.array(counted), np.array(active))


def test_codes_are_converted_where_a_gpu_flushes_halves(refusing, monkeypatch, capfd):
    """Metal allows it. A sum of MLX's tells at once; where only our kernel meets it, its check does."""
    _, launches = refusing
    case = Case((128,), 96)
    x, wide = problems.vector(case), CUTS["narrow"]._replace(decode=geometry.HALVES)
    use(monkeypatch, wide)
    monkeypatch.setattr(plans, "keeps_subnormal_halves", lambda: False)
    assert plans.choose(problems.matrices(case), x.dtype).decode == geometry.CONVERT
    assert_right(x, problems.matrices(case))
    assert capfd.readouterr().err == ""

    monkeypatch.setattr(plans, "keeps_subnormal_halves", lambda: True)
    real, kept = kernel_text.body, "code = float(as_type<float16_t>(half_of(pair, high)));"
    assert kept in real("sparse_gemv.metal")
    monkeypatch.setattr(kernel_text, "body", lambda name: real(name).replace(kept, "code = 0.0f;"))
    launches.clear()
    assert_right(x, problems.matrices(case))
    assert len(set(launches)) == 2  # that of halves, and then that which converts: MLX's matmul is not needed
    assert capfd.readouterr().err.count("a GPU kernel is wrong") == 1


def test_this_machine_keeps_subnormal_halves():
    assert plans.keeps_subnormal_halves()


def test_the_backend_names_what_it_does_without(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(first_use, "_refused", {})
    assert gpu.find().reason == "MLX has a Metal GPU"
    first_use._refused["key"] = "a kernel does not run: no reason [spqt_gemv_1_abc]"
    found = gpu.find()
    assert found.name == "metal"
    assert found.reason == (
        "MLX has a Metal GPU; without 1 of our kernels: a kernel does not run: no reason [spqt_gemv_1_abc]"
    )


def test_a_way_that_others_stood_in_for_is_not_remembered(monkeypatch, fresh_trust):
    kept, choices = [], {}
    monkeypatch.setattr(first_use, "store", lambda *_: kept.append(1))
    monkeypatch.setattr(ways, "measured", lambda *_: ways.Choice(["few"] * len(ways.COUNTS), {}, 0.0, 0.0))
    monkeypatch.setattr(ways, "_chosen", {})
    monkeypatch.setattr(ways, "known", lambda: choices)
    first_use._refused["key"] = "refused"
    ways.choice_for(ways.Kind(mx.float16, 4, 64), {})
    assert kept == []
    ways._chosen.clear()
    choices.clear()
    first_use._refused.clear()
    ways.choice_for(ways.Kind(mx.float16, 4, 64), {})
    assert kept == [1]
