"""What follows a mixture's norm in a decode step on a GPU: router, choice, experts, their sum.

Where the module is a router and experts alone, whose numbers weigh them in a way that kernels know, these
run; else the module's own code, traced once. Building its graph anew for each token takes Python as long as
the GPU takes for small experts; traced, MLX replays it, and joins its elementwise operations.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from spqt_cli.backends import select
from spqt_cli.backends.accuracy import close
from spqt_cli.decode import active_counts, foreign, phase, recognize

# h, normed, and of each tally what it has so far, None where it does not count; None: nothing is counted.
Step = Callable[
    [mx.array, mx.array, Sequence[Sequence[Any] | None] | None], tuple[mx.array, Sequence[Sequence[Any]]]
]


class TracedMixture:
    """h + module(normed) for one token; it is taken once it has given what the module's own code gives.

    reason: why it is not taken; "" where it is, None before the first token.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.reason: str | None = None
        self.by_kernels = False  # and not by the module's own code
        self._asked: Sequence[_Running] = []  # what is counted, in order
        self._step: Step | None = None

    def __call__(self, h: mx.array, normed: mx.array) -> mx.array | None:
        """y for h and norm(h), one row each; None where the module's own code is to run."""
        if normed.size != normed.shape[-1] or not phase.decodes():
            return None
        if self.reason is None:
            try:
                mx.eval(h, normed)
            except ValueError:  # within mx.compile or mx.grad
                return None
            self.reason = self._prepare(h, normed)
        if self._step is None:
            return None
        counter = active_counts.current()
        tallies = [] if counter is None else [counter.tally(one.groups, one.in_step) for one in self._asked]
        if not any(tallies):
            return self._step(h, normed, None)[0]
        y, counted = self._step(h, normed, [None if one is None else one.running for one in tallies])
        for tally, asked, counts in zip(tallies, self._asked, counted, strict=True):
            if tally is not None:
                tally.reads_all = asked.reads_all
                tally.keep(counts, asked.rows)
        return y

    def _prepare(self, h: mx.array, normed: mx.array) -> str:
        """Choose a step; why there is none, or "". What is compared is without h, which may be far larger."""
        for part in self._module.modules():
            ours = foreign.own_class(part).__module__.partition(".")[0] in ("mlx", "mlx_lm")
            if not ours and not recognize.is_zigzag(part):
                return f"its {type(part).__name__} may watch its calls"
        recorder, nothing = _Recorder(None), mx.zeros_like(h)
        try:
            with active_counts.counting_by(recorder):
                expected = nothing + self._module(normed)
                mx.eval(expected)
        except Exception as error:  # code of others, which may have any form
            return f"its code can't be run alone ({type(error).__name__}: {error})"
        reason = ""
        ways: list[tuple[bool, Callable[[], tuple[Sequence[_Running], Step] | None]]] = [
            (True, lambda: self._by_kernels(normed)),
            (False, lambda: (recorder.asked, self._traced())),
        ]
        for by_kernels, make in ways:
            try:
                if (made := make()) is None:
                    continue
                found = made[1](nothing, normed, None)[0]
                if found.dtype == expected.dtype and close(found, expected):
                    self.by_kernels, (self._asked, self._step) = by_kernels, made
                    return ""
                reason = "traced it gives something else"
            except Exception as error:
                reason = f"its code can't be traced ({type(error).__name__}: {error})"
        return reason

    def _by_kernels(self, normed: mx.array) -> "tuple[Sequence[_Running], Step] | None":
        mixture = recognize.mixture(self._module)
        made = None if mixture is None else select.prepare_mixture(normed, mixture)
        if mixture is None or made is None:
            return None
        layers: list[Any] = [mixture.pair[0], mixture.down]
        groups = [layer.shared_input for layer in layers]
        counting = [at for at, group in enumerate(groups) if group.skips]
        asked = [_Running([groups[at]], 1, []) for at in counting]
        for one in asked:
            one.rows = mixture.chosen

        def step(
            h: mx.array, normed: mx.array, running: Sequence[Sequence[Any] | None] | None
        ) -> tuple[mx.array, Sequence[Sequence[Any]]]:
            before: list[Any] = [None, None]
            for at, counts in zip(counting, running or [None] * len(counting), strict=True):
                before[at] = None if counts is None else counts[0]
            y, counted = made(h, normed, before)
            return y, [[counted[at]] for at in counting]

        return asked, step

    def _traced(self) -> Step:
        module = self._module

        @mx.compile
        def step(
            h: mx.array, normed: mx.array, running: Sequence[Sequence[Any] | None] | None
        ) -> tuple[mx.array, Sequence[Sequence[Any]]]:
            recorder = None if running is None else _Recorder(running)
            with active_counts.counting_by(recorder):
                y = h + module(normed)
            return y, [] if recorder is None else [one.counted for one in recorder.asked]

        return step


class _Running:
    """Stands for a tally while code is traced. running: what it counts on from; counted: what it gave."""

    def __init__(self, groups: Sequence[Any], in_step: int, running: Sequence[Any]) -> None:
        self.groups, self.in_step, self.running = groups, in_step, running
        self.counted: list[Any] = [None] * len(groups)
        self.rows: int | None = None
        self.reads_all = False

    def keep(self, counted: Sequence[Any], rows: int | None = None) -> None:
        """As `Tally.keep`."""
        self.counted, self.rows = list(counted), rows


class _Recorder:
    """Stands for a counter while code is traced. asked: what it was asked for, in order.

    running: the counts of each, None for one that is not counted now; without, all begin.
    """

    def __init__(self, running: Sequence[Any] | None) -> None:
        self._running = running
        self.asked: list[_Running] = []

    def tally(self, groups: Sequence[Any], rows: int = 1) -> _Running | None:
        """As `Counter.tally`."""
        begun = active_counts.Tally(groups, rows).running
        running = begun if self._running is None else self._running[len(self.asked)]
        self.asked.append(_Running(groups, rows, running))
        return None if running is None else self.asked[-1]

    def count_rows(self, layer: Any, active: mx.array) -> None:
        """As `Counter.count_rows`. Raises ValueError: a step of one row has no other way to count."""
        raise ValueError("it counts rows")


def places(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a mixture's parts, arrays, thresholds and settings are kept."""
    for part in module.modules():
        if recognize.is_zigzag(part):
            yield part, "weight"
            yield part.__dict__, "_threshold"
            continue
        for key in part:
            yield part, key
        for key, value in part.__dict__.items():
            if isinstance(value, (bool, int, float)):
                yield part.__dict__, key
