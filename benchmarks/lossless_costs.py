"""What a token with skipped channels and a step of several dense rows cost: read from stored results.

Costs are in units of one dense token of the same model and device. A draft mode pays where

    (1 + accepted drafts) / (drafts * cost of a sparse token + cost of drafts + 1 dense rows) > 1
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.machine import ROOT

RESULTS = ROOT / "benchmarks" / "results"
HALF = 0.5


class Costs(NamedTuple):
    """Costs of one model on one device. sparse: share skipped -> a token; rows: rows -> a dense step.

    Between shares, and between numbers of rows, they are interpolated; beyond the last share prolonged.
    """

    name: str
    source: str
    sparse: dict[float, float]
    rows: dict[int, float]

    def token(self, share: float) -> float:
        """Of a token at a share skipped."""
        known = sorted(({0.0: 1.0} | self.sparse).items())
        upper = next((i for i, (at, _) in enumerate(known) if at >= share), len(known) - 1)
        (x0, y0), (x1, y1) = known[max(upper, 1) - 1], known[max(upper, 1)]
        return y0 + (y1 - y0) * (share - x0) / (x1 - x0)

    def step(self, rows: int) -> float:
        """Of a dense step of so many rows."""
        known = sorted(({1: 1.0} | self.rows).items())
        if rows > known[-1][0]:
            raise ValueError(f"{self.name}: {rows} rows were not measured")
        return float(np.interp(rows, [at for at, _ in known], [cost for _, cost in known]))

    def speedup(self, share: float, accepted: Sequence[float], rows_free: bool = False) -> tuple[float, int]:
        """The best expected speed against dense decoding, and the number of drafts that gives it.

        accepted: of 1, 2, ... drafts a step, how many are accepted on average. rows_free: as if a step of
        several rows cost as much as one.
        """
        found = []
        for drafts, mean in enumerate(accepted, 1):
            spent = drafts * self.token(share) + (1.0 if rows_free else self.step(drafts + 1))
            found.append(((1 + mean) / spent, drafts))
        return max(found)

    def described(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "name": self.name,
            "source": self.source,
            "sparse_token": {str(share): round(cost, 4) for share, cost in self.sparse.items()},
            "rows": {str(rows): round(cost, 4) for rows, cost in self.rows.items()},
        }


def perfect(drafts: int) -> list[float]:
    """The means of drafts that are always accepted."""
    return [float(count) for count in range(1, drafts + 1)]


def stored() -> list[Costs]:
    """What the results in benchmarks/results give."""
    of_70b, of_8b = "h200-decode-llama-3-70b", "h200-decode-llama-3-8b"
    profiled = "h200-peers-8b-3983df7"
    rows_70b = _gpu_rows([(28672, 8192)])
    rows_8b = _gpu_rows([(14336, 4096), (14336, 4096), (4096, 14336)])
    return [
        Costs("70B shape, bytes alone", of_70b, _bytes(of_70b), {8: 1.0}),
        Costs("70B shape, H200", f"{of_70b}, h200-rows", _gpu_token(of_70b), rows_70b),
        Costs("8B shape, H200", f"{of_8b}, h200-rows", _gpu_token(of_8b), rows_8b),
        Costs(
            "8B shape, H200, profile",
            f"{profiled}, h200-rows",
            _gpu_token(profiled, ", profile"),
            rows_8b,
        ),
        Costs("1B shape, 2 CPU cores", "cpu, cpu-rows", _cpu_token("llama-3.2-1b"), _cpu_rows(8960, 1536)),
        Costs("SmolLM2, 2 CPU cores", "cpu, cpu-rows", _cpu_token("smollm2-135m"), _cpu_rows(8960, 1536)),
    ]


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _gpu_token(name: str, profile: str = "") -> dict[float, float]:
    """By whole models' tokens per second, without context."""
    rows = [row for run in _read(name) for row in run["rows"] if "rate" in row]
    decoding = [row for row in rows if row["test"].startswith("tg") and row["depth"] == 0]
    rates = {row["variant"]: row["rate"]["median"] for row in decoding}
    return {HALF: rates[f"zigzag dense{profile}"] / rates[f"sparse 50%{profile}"]}


def _bytes(name: str) -> dict[float, float]:
    """As if reading weights were all: a bound."""
    (run,) = _read(name)
    size_of = {row["variant"]: row["weight_bytes"] for row in run["rows"]}
    return {HALF: size_of["sparse 50%"] / size_of["zigzag dense"]}


def _gpu_rows(shapes: Sequence[tuple[int, int]]) -> dict[int, float]:
    """By single products, those of a block summed: of the kernels for at least so many rows the fastest."""
    one = {tuple(row["shape"]): row["1.0"]["us"] for row in _read("h200-shapes")["rows"] if "shape" in row}
    found: dict[tuple[int, int], dict[int, float]] = {}
    for row in _read("h200-rows")["rows"]:
        if "shape" in row:
            found.setdefault(tuple(row["shape"]), {})[row["rows"]] = row[row["chosen"]]["us"]
    costs = {}
    for rows in (2, 3, 4, 6, 8):
        spent = [min(us for count, us in found[shape].items() if count >= rows) for shape in shapes]
        costs[rows] = sum(spent) / sum(one[shape] for shape in shapes)
    return costs


def _cpu_token(shape: str) -> dict[float, float]:
    """By whole models' tokens per second, with all threads."""
    of_shape = [row for row in _read("cpu")["decode"] if row["shape"] == shape]
    rates = max(of_shape, key=lambda row: row["threads"])["tokens_per_s"]
    return {HALF: rates["dense"]["median"] / rates["half"]["median"]}


def _cpu_rows(outputs: int, inputs: int) -> dict[int, float]:
    """By a single product."""
    of_shape = {
        row["rows"]: row["all"]
        for row in _read("cpu-rows")["rows"]
        if (row["outputs"], row["inputs"]) == (outputs, inputs)
    }
    return {rows: us / of_shape[1] for rows, us in of_shape.items() if 1 < rows <= 8}
