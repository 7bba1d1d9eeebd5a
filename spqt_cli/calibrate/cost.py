"""How long a calibration will take on this machine, from its arithmetic and a product that is timed now."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from spqt_cli.calibrate.greedy import HIGHEST, STEP, TOKENS
from spqt_cli.calibrate.measurements import REFINING_ROUNDS, REFINING_WINDOWS
from spqt_cli.calibrate.methods import Method
from spqt_cli.calibrate.targets import STEPS
from spqt_cli.measure import many_rows
from spqt_cli.measure.duration import speed

# Measured in CPU time of one core, on SmolLM2-135M and Gemma-3-270M
HEADS = 2.0  # times a product's time that a head takes, with what is computed of its logits
BACKWARDS = 2.0  # passes that a backward pass is worth
UNPACKING = 2e-9  # seconds a weight and pass
REST = 1.5e-8  # seconds an input and token: attention, norms, histograms, masks
DROPPING = 1e-8  # seconds an input and token: what each of 37 thresholds drops
RAISED = 1.6  # errors measured for each step of the greedy search
# On a GPU, not measured: what the host does with each input and token, and with each layer and pass
HOST_INPUT, HOST_PASS = 2e-9, 1e-3


@dataclass
class Work:
    """What is to be run. passes: over the blocks; tokens: in them together; heads: tokens through the head.

    gradients, sloped: passes, and tokens in them, that are differentiated.
    """

    passes: float = 0.0
    tokens: float = 0.0
    heads: float = 0.0
    gradients: float = 0.0
    sloped: float = 0.0

    def add(self, count: float, tokens: float, heads: float = 0.0) -> None:
        """Add `count` passes of so many tokens each, `heads` of them through the head."""
        self.passes += count
        self.tokens += count * tokens
        self.heads += count * heads


@dataclass(frozen=True)
class Windows:
    """calibrating, held_out: how many. length: tokens of each. observed, differentiated: done earlier."""

    calibrating: int
    held_out: int
    length: int
    observed: int = 0
    differentiated: int = 0

    @classmethod
    def of(cls, tokens: int, length: int) -> "Windows":
        """How so many tokens divide, of which nothing is done yet: a quarter of the windows is held out."""
        count = tokens // length
        held_out = max(1, count // 4)
        return cls(count - held_out, held_out, length)


class Sized(Protocol):
    """What is asked of a layer: as of a ZigzagLayer."""

    @property
    def inputs(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def chosen(self) -> int: ...


def work(windows: Windows, method: Method, largest: int, *, searches: bool) -> Work:
    """What a method runs over the windows. largest: layers of the block that has most of them.

    searches: a limit is looked for, and so each of STEPS sparsities is refined and scored.
    """
    half, effort, found = windows.length / 2, method.effort, Work()
    candidates = len(method.allocations)
    refining = min(REFINING_WINDOWS, windows.calibrating)
    found.add(windows.calibrating - windows.observed, windows.length)
    if "gradient" in method.allocations:
        count = max(0, min(effort.gradient_windows, windows.calibrating) - windows.differentiated)
        found.gradients, found.sloped = count, count * half
    if "paper" in method.allocations:
        found.add(RAISED * largest * HIGHEST / STEP, TOKENS)
    found.add(candidates * effort.rounds * refining, half)
    found.add(min(effort.second_windows, windows.calibrating), half)
    found.add(windows.held_out * (2 + candidates), half, half)
    if searches:
        found.add((STEPS + 1) * REFINING_ROUNDS * refining, half)
        found.add((STEPS + 1) * windows.held_out * 3, half, half)
    return found


def seconds(layers: Mapping[str, Sized], weights: int, of: Work) -> float:
    """The expected time, give or take a half; of what is searched by decoding, without that.

    weights: of the whole model; what is no layer's counts as its head.
    """
    zigzag = sum(layer.size for layer in layers.values())
    stored = sum(layer.size // layer.chosen * getattr(layer, "num_experts", 1) for layer in layers.values())
    inputs, on_cpu = sum(layer.inputs for layer in layers.values()), many_rows.on_cpu()
    passes = of.passes + (1 + BACKWARDS) * of.gradients
    tokens = of.tokens + (1 + BACKWARDS) * of.sloped
    heads = of.heads + (1 + BACKWARDS) * of.sloped
    spent = 2 * (zigzag * tokens + HEADS * (weights - zigzag) * heads) / speed()
    spent += inputs * (tokens * (REST if on_cpu else HOST_INPUT) + DROPPING * of.sloped)
    return spent + passes * (UNPACKING * stored if on_cpu else HOST_PASS * len(layers))
