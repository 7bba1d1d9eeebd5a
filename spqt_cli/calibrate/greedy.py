"""The paper's allocation: inside each block, greedily, by the error of the block's output.

Every block ends at the same share. A block's layers start dense; again and again the layer whose next
step adds least output error per weight skipped is raised. TEAL scales its steps by layer size instead,
which leaves small k and v layers of grouped-query attention never chosen; price per weight does not.

Source: TEAL (arXiv 2408.14690), block-wise greedy optimization.
"""

import heapq
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from spqt_cli.errors import UnsupportedError
from spqt_cli.format import thresholds
from spqt_cli.format.thresholds import CURVE_SPARSITIES
from spqt_cli.measure import many_rows, probes

STEP = 0.05  # of a layer's inputs
HIGHEST = 0.9
TOKENS = 256
_BLOCK = re.compile(r"^(.*?\.\d+)\.")


def levels(
    model: nn.Module,
    harness: probes.Harness,
    tokens: np.ndarray,
    counts: Mapping[str, np.ndarray],
    on_step: Callable[[str], None],
) -> dict[str, np.ndarray]:
    """Path -> the layer's share at each total of CURVE_SPARSITIES: (50,), rising.

    model: probed. tokens: (length,), the first TOKENS are used. counts: path -> histogram of |x|.
    """
    blocks = blocks_of(model, counts)
    found: dict[str, np.ndarray] = {}

    def searched(block: nn.Module, call: Callable[..., Any], x: mx.array, *rest: Any, **named: Any) -> Any:
        out = call(block, x, *rest, **named)
        on_step("searching block by block")
        _, paths = blocks[id(block)]
        search = Search(
            lambda: call(block, x, *rest, **named), out, harness, {path: counts[path] for path in paths}
        )
        sizes = {path: harness.layers[path].inputs * harness.layers[path].outputs for path in paths}
        found.update(search.run(sizes))
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


class Search:
    """The greedy search in one block."""

    def __init__(
        self,
        run: Callable[[], Any],
        dense: Any,
        harness: probes.Harness,
        counts: Mapping[str, np.ndarray],
    ) -> None:
        self._run, self._dense, self._harness = run, _first(dense), harness
        shares = np.arange(round(HIGHEST / STEP) + 1) * STEP
        self._steps = {path: thresholds.quantile(seen, shares) for path, seen in counts.items()}
        self.level = dict.fromkeys(counts, 0)

    def error(self, raised: str) -> float:
        """The squared error of the block's output if one layer went a step further."""
        level = {**self.level, raised: self.level[raised] + 1}
        values = {path: float(self._steps[path][step]) for path, step in level.items()}
        self._harness.masking = probes.Masking(values)
        out = _first(self._run())
        self._harness.masking = None
        return float(np.array(mx.square((out - self._dense).astype(mx.float32)).sum()))

    def run(self, weights: Mapping[str, int]) -> dict[str, np.ndarray]:
        """Path -> share per total. Errors only grow as others are raised, so stale ones can wait."""
        whole, last, error = sum(weights.values()), round(HIGHEST / STEP), 0.0
        totals, states = [0.0], [dict(self.level)]
        queue = [(-np.inf, path, -1, 0.0) for path in sorted(weights)]
        heapq.heapify(queue)
        while queue:
            _, path, seen_at, after = heapq.heappop(queue)
            if seen_at != len(states):  # priced before the last step: price anew
                after = self.error(path)
                heapq.heappush(queue, ((after - error) / weights[path], path, len(states), after))
                continue
            self.level[path] += 1
            error = after
            totals.append(sum(self.level[p] * STEP * weights[p] for p in weights) / whole)
            states.append(dict(self.level))
            if self.level[path] < last:
                heapq.heappush(queue, ((after - error) / weights[path], path, -1, 0.0))
        totals.append(1.0)
        ends = [
            *({path: step * STEP for path, step in state.items()} for state in states),
            dict.fromkeys(weights, 1.0),
        ]
        return {path: np.interp(CURVE_SPARSITIES, totals, [end[path] for end in ends]) for path in weights}


def _first(out: Any) -> mx.array:
    """A block's hidden state; some models' blocks return more beside it."""
    result: mx.array = out[0] if isinstance(out, (tuple, list)) else out
    return result
