"""The GPU's kernel for error-compensating rounding against its definition, emulated where no GPU is."""

import re
from importlib import resources

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.backends.gpu import compensate as gpu
from spqt_cli.backends.gpu import launch as launching
from spqt_cli.backends.interface import Backend
from spqt_cli.errors import BackendError
from spqt_cli.fit import compensate, gptq, grid
from spqt_cli.fit.hessian import Inputs
from tests.metal.emulator import emulate


@pytest.fixture(autouse=True)
def reports(monkeypatch):
    """Faults that the emulator saw; none are allowed."""
    if mx.default_device().type == mx.DeviceType.gpu:
        yield []
        return
    found: list[str] = []

    def run(launch, inputs):
        emulation = emulate(launch, inputs)
        found.extend(emulation.reports)
        return emulation.outputs

    monkeypatch.setattr(launching, "run", run)
    yield found
    assert found == []


def problem(inputs, columns):
    rng = np.random.default_rng(inputs)
    factor = np.triu(rng.normal(size=(inputs, inputs)) * 0.5 / np.sqrt(inputs), 1).astype(np.float32)
    factor.flat[:: inputs + 1] = 1
    return (rng.standard_t(5, size=(inputs, columns)) * 0.05).astype(np.float32), factor


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype"),
    [
        (4, 64, mx.float16),
        (3, 32, mx.bfloat16),
        (8, 128, mx.float32),
        (2, 128, mx.float16),
        (5, 32, mx.float32),
    ],
)
@pytest.mark.parametrize("inputs", [1, 64, 100])
def test_is_the_definition(inputs, bits, group_size, dtype):
    target, factor = problem(inputs, 2 * group_size)
    target[:, 0] = 0
    target[0, group_size:] = 0.25
    ours, theirs = (
        version(target, factor, bits, group_size, dtype)
        for version in (gpu.compensate, compensate.compensate)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    assert (ours[0] == theirs[0]).mean() > 0.95
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert (np.abs(one - other) <= 2e-3 * np.abs(other).max()).mean() > 0.95
        assert np.array_equal(one, np.array(mx.array(one).astype(dtype).astype(mx.float32)))


def test_the_first_channel_alone_gives_the_same_bits():
    """Without errors to pass on, only sums of squares are in another order."""
    target, factor = problem(1, 512)
    ours, theirs = (
        version(target, factor, 4, 64, mx.float16) for version in (gpu.compensate, compensate.compensate)
    )
    assert all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_values_that_fit_no_half():
    target = np.linspace(-1e6, 1e6, 64, dtype=np.float32)[None]
    _, scales, biases = gpu.compensate(target, np.ones((1, 1), np.float32), 4, 64, mx.float16)
    assert not (np.isfinite(scales) & np.isfinite(biases)).any()


def test_the_kernel_searches_where_the_definition_does():
    text = resources.files("spqt_cli.metal").joinpath("compensate.metal").read_text()
    body = re.search(r"float clipped\(int choice\) \{(.*?)\}", text, re.S)[1]
    choices = [float(one) for one in re.findall(r"(\d\.\d+)f", body)]
    assert tuple(choices) == grid.CLIPPED
    assert f"CLIPS = {len(grid.CLIPPED)}, REFITS = {grid.REFITS}" in text
    assert gpu.SPAN == compensate.SPAN


def test_a_kernel_that_differs_is_refused(monkeypatch):
    def wrong(*arguments):
        codes, scales, biases = compensate.compensate(*arguments)
        return codes, scales * 1.1, biases

    monkeypatch.setattr(gptq, "backend", lambda: Backend("planted", "", calls=None, compensate=wrong))
    x = np.random.default_rng(0).normal(size=(100, 40)).astype(np.float32)
    form = gptq.Form(4, 64, 64, mx.float16)
    with pytest.raises(BackendError, match="rounds otherwise than defined"):
        gptq.solve([np.ones((64, 40), np.float32)], [form], Inputs(x.T @ x))


def test_a_matrix_is_rounded_as_well_as_by_the_definition(monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 16)) @ rng.normal(size=(16, 100)) + 0.5 * rng.normal(size=(300, 100))
    hessian, w = (x.T @ x).astype(np.float32), rng.normal(size=(64, 100)).astype(np.float32)
    form, errors = gptq.Form(4, 64, 64, mx.float16), []
    for kernel in (gpu.compensate, None):
        monkeypatch.setattr(
            gptq, "backend", lambda k=kernel: Backend("planted", "", calls=None, compensate=k)
        )
        (found,) = gptq.solve([w], [form], Inputs(hessian))
        parts = (found.weight, found.scales.astype(mx.float32), found.biases.astype(mx.float32))
        off = np.array(gptq.layout.dequantize(*parts, outputs=64, bits=4, group_size=64)) - w
        errors.append(float(np.sum((off @ hessian) * off)))
    assert errors[0] == pytest.approx(errors[1], rel=0.02)
