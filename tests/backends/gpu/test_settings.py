"""The numbers of a launch: what Python packs is what the kernels read, field by field.

Contract: `settings` holds a LaunchSettings, a ProjectionSettings of each projection, then float32 numbers
(metal/settings.h). Each field is changed alone, and the emulated launches must do something else: other
outputs, or accesses that the emulator reports. No tolerance: outputs are compared bit for bit.
"""

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.backends import problems
from spqt_cli.backends.gpu import kernel_text, launch, settings
from spqt_cli.backends.gpu.settings import LaunchSettings, ProjectionSettings
from spqt_cli.backends.interface import Norm
from tests.backends.gpu.test_kernels import CUTS
from tests.metal.emulator import emulate

CASE = problems.Case((1100, 300), 96, group_size=32, band=160, bias=True)
PROJECTIONS = len(CASE.outputs)
CHANGED = {  # else the half
    "eps": lambda _: 3.0,
    "first_tile": lambda value: (value - 1) % 2**32,
    "tiles": lambda value: value + 1,
    "weight": lambda value: value + 1,
    "scales": lambda value: value + 1,
    "biases": lambda value: value + 1,
}


def records(packed: mx.array) -> tuple[LaunchSettings, list[ProjectionSettings]]:
    """The records at the head of a settings array."""
    first, each = len(LaunchSettings._fields), len(ProjectionSettings._fields)
    words = np.array(packed)[: first + PROJECTIONS * each].tolist()
    launch_words, eps = words[: first - 1], np.array(words[first - 1], np.uint32).view(np.float32)
    own = [words[first + p * each : first + (p + 1) * each] for p in range(PROJECTIONS)]
    return LaunchSettings(*launch_words, float(eps)), [ProjectionSettings(*one) for one in own]


def found(plan: launch.Plan, x: mx.array, numbers: mx.array):
    """Outputs, counts and reports of the three launches of a plan, with other settings."""
    first = emulate(plan.gemv, [x, numbers, *plan.inputs[1:]])
    sums = [*first.outputs, numbers]
    reduced, counted = emulate(plan.reduce, sums), emulate(plan.counts, [*sums, plan.nothing])
    outputs = [np.array(one).tobytes() for one in (*reduced.outputs, *counted.outputs)]
    return outputs, first.reports + reduced.reports + counted.reports


@pytest.fixture(scope="module")
def planned():
    x = problems.vector(CASE)
    form = launch.Form(norm=Norm(mx.ones((CASE.inputs,), CASE.dtype), 1e-5))
    cut = CUTS["wide"]._replace(stripe=40, decode=3)
    plan = launch.make_plan(x.shape, x.dtype, problems.matrices(CASE), cut, form)
    return plan, x, found(plan, x, plan.inputs[0])


def test_packed_records_are_read_back_as_packed(planned):
    plan, x, (_, reports) = planned
    first, own = records(plan.inputs[0])
    assert reports == []
    assert (first.inputs, first.stripe, first.projections) == (x.size, 40, PROJECTIONS)
    assert first.eps == np.float32(1e-5)
    assert [one.outputs for one in own] == list(CASE.outputs)
    assert [one.first_tile for one in own] == [0, 7 * own[0].tiles]  # 1,100 outputs in 7 bands of 160
    assert own[0].weight < own[0].scales < own[0].biases < own[1].weight


FIELDS = [(None, name) for name in LaunchSettings._fields]
FIELDS += [(p, name) for p in range(PROJECTIONS) for name in ProjectionSettings._fields]


@pytest.mark.parametrize(("projection", "field"), FIELDS)
def test_each_field_changes_what_the_kernels_read(planned, projection, field):
    plan, x, before = planned
    first, own = records(plan.inputs[0])
    change = CHANGED.get(field, lambda value: value // 2)
    if projection is None:
        first = first._replace(**{field: change(getattr(first, field))})
    else:
        own[projection] = own[projection]._replace(**{field: change(getattr(own[projection], field))})
    head = len(first) + PROJECTIONS * len(own[0])
    rest = plan.inputs[0][head:].view(mx.float32)
    assert found(plan, x, settings.pack(first, own, [rest])) != before


def test_metal_declares_the_fields_in_the_order_in_which_they_are_packed():
    text = settings.metal_text()
    names = [*LaunchSettings._fields, *ProjectionSettings._fields]
    places = [text.index(f" {name};") for name in names[: len(LaunchSettings._fields)]]
    own = text[text.index("struct ProjectionSettings") :]
    places += [text.index(own) + own.index(f" {name};") for name in ProjectionSettings._fields]
    assert places == sorted(places)
    assert text.count(";") == len(names) + 2
    for kernel in (kernel_text.count_kernel(),):
        assert text in kernel_text.metal(kernel)[1]
        assert text in kernel_text.cuda(kernel)[1]
