"""What a dry run of `convert` says of the work after it: a fit, a calibration; how long, in how much memory.

The estimates are those that a fit and a calibration begin with, here from the plan's shapes alone.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

from spqt_cli.calibrate import calibrate
from spqt_cli.calibrate.stream import blocks
from spqt_cli.convert.convert import Rehearsal, Step
from spqt_cli.convert.plan import ZIGZAG
from spqt_cli.fit import cost, fit
from spqt_cli.measure import texts

if TYPE_CHECKING:
    from spqt_cli.calibrate.options import CalibrateOptions
    from spqt_cli.fit.options import FitOptions


@dataclass(frozen=True)
class Shape:
    """A Zigzag layer to come. chosen: of `num_experts` matrices, those that a token is multiplied by."""

    inputs: int
    outputs: int
    chosen: int = 1
    num_experts: int = 1

    @property
    def size(self) -> int:
        """As a ZigzagLayer's."""
        return self.inputs * self.outputs * self.chosen


def shapes(found: Rehearsal) -> dict[str, Shape]:
    """Path -> shape of each Zigzag layer."""
    layers = {}
    for unit in found.plan.units:
        if unit.kind == ZIGZAG:
            *experts, outputs, inputs = found.weights[unit.name].shape
            count = experts[0] if experts else 1
            layers[unit.path] = Shape(inputs, outputs, round(unit.read * count), count)
    return layers


def fitting(found: Rehearsal, wishes: "FitOptions") -> Step:
    """The fit. Raises UsageError for wishes out of range, SpqtError for a text that can't be read."""
    wishes.check()
    if wishes.data is not None:
        texts.read(wishes.data)
    options = wishes.settled()
    own, steps = options.own or 0, (options.steps or 0) if options.method == "full" else 0
    # A mixture's experts are rounded plainly.
    matrices = [shape for shape in shapes(found).values() if shape.num_experts == 1]
    seconds = cost.of_options(matrices, found.plan.weights, options)
    memory, said = _memory(found) if own else (None, "")
    text = [f"{own} texts of {options.window} tokens that the source writes"] if own else []
    text += [str(options.data)] if options.data is not None else []
    trained = f", {steps} steps of training" if steps else ""
    what = f"{options.method}, on {' and '.join(text)}{trained}; {cost.words(seconds)} here{said}"
    return Step("fit", what, seconds, memory)


def _memory(found: Rehearsal) -> tuple[int, str]:
    """(bytes of the source's weights while it writes its text, what is to be said of that)."""
    needed = cost.source_bytes(found.checkpoint)
    room = fit.EIGHT_BITS_FIT * psutil.virtual_memory().available
    said = f"; while it writes it takes {needed / 1e6:.0f} MB of memory, without keys and values"
    if needed / 4 > room:
        return needed, f"{said}; they are not free: give a text, --own-text 0 --data FILE"
    return needed, f"{said}; they are not free: it will be read in 8 bits" if needed > room else said


def calibrating(found: Rehearsal, options: "CalibrateOptions") -> Step:
    """The calibration. Raises UsageError for options out of range."""
    options.check()
    if options.stream is None and not blocks.bytes_fit(found.plan.written_bytes):
        options = options.streamed()
    checkpoint = found.checkpoint
    config: dict[str, Any] = {**checkpoint.config, "spqt": checkpoint.exact or {}}
    seconds = calibrate.expected_seconds(shapes(found), found.plan.weights, config, options)
    reads = found.result.reads
    text = f"{options.tokens} tokens of {texts.SHIPPED if options.data is None else options.data}"
    what = (
        f"{reads.sparsity:.0%} sparsity ({reads.origin}), method {options.method}, on {text}; "
        f"{cost.words(seconds)} here"
    )
    return Step("calibrate", what, seconds)


def with_steps(found: Rehearsal, wishes: "FitOptions | None", options: "CalibrateOptions | None") -> Any:
    """The ConvertResult of a dry run, and what would follow: a fit, a calibration, or neither."""
    then = [] if wishes is None else [fitting(found, wishes)]
    then += [] if options is None else [calibrating(found, options)]
    return dataclasses.replace(found.result, then=then)
