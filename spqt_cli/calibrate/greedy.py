"""The paper's allocation: inside each block, greedily, by the error of the block's output.

Every block ends at the same sparsity. A block's layers start dense; again and again the layer whose next
step adds least output error per weight skipped is raised. TEAL scales its steps by layer size instead,
which never chooses the small k and v layers of grouped-query attention; error per weight does.

Source: TEAL (arXiv 2408.14690), block-wise greedy optimization.
"""

import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from spqt_cli.calibrate.measurements import OnProgress
from spqt_cli.errors import UnsupportedError
from spqt_cli.format import thresholds
from spqt_cli.format.thresholds import CURVE_SPARSITIES
from spqt_cli.measure import many_rows, probes

STEP = 0.05  # of a layer's inputs
HIGHEST = 0.9
TOKENS = 256
_BLOCK = re.compile(r"^(.*?\.\d+)\.")


def sparsities(
    model: nn.Module,
    harness: probes.Harness,
    tokens: np.ndarray,
    counts: Mapping[str, np.ndarray],
    on_progress: OnProgress,
) -> dict[str, np.ndarray]:
    """Path -> the layer's sparsity at each total of CURVE_SPARSITIES: (50,), rising.

    model: probed. tokens: (length,), the first TOKENS are used. counts: path -> histogram of |x|.
    Raises UnsupportedError for a layer that no block calls.
    """
    blocks = blocks_of(model, counts)
    done, found = 0, dict[str, np.ndarray]()

    def searched(block: nn.Module, call: Callable[..., Any], x: mx.array, *rest: Any, **named: Any) -> Any:
        nonlocal done
        _, paths = blocks[id(block)]
        on_progress(done, len(blocks), "searching block by block")
        done += 1
        out, found_here = search(
            lambda: call(block, x, *rest, **named), harness, {path: counts[path] for path in paths}
        )
        found.update(found_here)
        return out

    with probes.hooked([block for block, _ in blocks.values()], searched), many_rows.many_rows(heads=False):
        model(mx.array(tokens[None, :TOKENS]))
    if missing := set(counts) - set(found):
        raise UnsupportedError(
            f"{min(missing)} was not reached through a block", "use --method auto, which needs no blocks"
        )
    return found


def blocks_of(model: nn.Module, paths: Iterable[str]) -> dict[int, tuple[nn.Module, list[str]]]:
    """Of each block: by identity, the module and the paths of its layers."""
    modules = dict(model.named_modules())
    blocks: dict[int, tuple[nn.Module, list[str]]] = {}
    for path in paths:
        match = _BLOCK.match(path)
        if match is None:
            raise UnsupportedError(f"{path} stands in no block", "use --method auto, which needs no blocks")
        block = modules[match[1]]
        blocks.setdefault(id(block), (block, []))[1].append(path)
    return blocks


def largest_block(paths: Iterable[str]) -> int:
    """How many layers the block has that has most of them."""
    found = Counter(match[1] if (match := _BLOCK.match(path)) else path for path in paths)
    return max(found.values())


def search(
    run: Callable[[], Any], harness: probes.Harness, counts: Mapping[str, np.ndarray]
) -> tuple[Any, dict[str, np.ndarray]]:
    """The dense output of one block, and path -> the layer's sparsity at each total: (50,), rising.

    run: runs the block. counts: path -> histogram of |x|, of the block's layers that may skip.
    """
    dense = run()
    layers = {path: harness.layers[path] for path in counts}
    sizes = {path: layer.size for path, layer in layers.items()}
    return dense, _Search(run, dense, harness, counts).run(sizes)


class _Search:
    """The greedy search in one block. reached: path -> how many steps of STEP its layer was raised."""

    def __init__(
        self,
        run: Callable[[], Any],
        dense: Any,
        harness: probes.Harness,
        counts: Mapping[str, np.ndarray],
    ) -> None:
        self._run, self._dense, self._harness = run, _first(dense), harness
        steps = np.arange(round(HIGHEST / STEP) + 1) * STEP
        self._thresholds = {path: thresholds.quantile(seen, steps) for path, seen in counts.items()}
        self.reached = dict.fromkeys(counts, 0)

    def error(self, raised: str) -> float:
        """The squared error of the block's output if one layer went a step further."""
        steps = {**self.reached, raised: self.reached[raised] + 1}
        values = {path: float(self._thresholds[path][step]) for path, step in steps.items()}
        with self._harness.masked(probes.Masking(values)):
            out = _first(self._run())
        return float(np.array(mx.square((out - self._dense).astype(mx.float32)).sum()))

    def run(self, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        """Path -> sparsity at each total. Errors only grow as others are raised, so stale ones can wait."""
        all_weights, last, error = sum(sizes.values()), round(HIGHEST / STEP), 0.0
        totals, states = [0.0], [dict(self.reached)]
        queue = [(-np.inf, path, -1, 0.0) for path in sorted(sizes)]
        heapq.heapify(queue)
        while queue:
            _, path, seen_at, after = heapq.heappop(queue)
            if seen_at != len(states):  # measured before the last step: measure again
                after = self.error(path)
                heapq.heappush(queue, ((after - error) / sizes[path], path, len(states), after))
                continue
            self.reached[path] += 1
            error = after
            totals.append(sum(self.reached[p] * STEP * sizes[p] for p in sizes) / all_weights)
            states.append(dict(self.reached))
            if self.reached[path] < last:
                heapq.heappush(queue, ((after - error) / sizes[path], path, -1, 0.0))
        totals.append(1.0)
        ends = [
            *({path: step * STEP for path, step in state.items()} for state in states),
            dict.fromkeys(sizes, 1.0),
        ]
        return {path: np.interp(CURVE_SPARSITIES, totals, [end[path] for end in ends]) for path in sizes}


def _first(out: Any) -> mx.array:
    """A block's hidden state; some models' blocks return more than it."""
    result: mx.array = out[0] if isinstance(out, (tuple, list)) else out
    return result
