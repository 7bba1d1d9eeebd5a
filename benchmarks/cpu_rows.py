"""Products of a few rows on the CPU: `python -m benchmarks.cpu rows`.

Ours as a decode step multiplies (`select.sparse_rows`), dense and with half of each row skipped, against
MLX's own product of the same rows, in turns; microseconds a product, and how many times one row of the same
kind.
"""

from typing import Any

import mlx.core as mx

from benchmarks import cpu
from spqt_cli.backends import select

SHAPES = ((4096, 4096), (14336, 4096), (8960, 1536))
ROWS = (1, 2, 4, 8, 16, 32)
DENSITIES = {"all": 1.0, "half": 0.5}


def microseconds(case: cpu.Case, rows: int) -> dict[str, float]:
    """One product of each kind."""
    x = mx.random.normal((rows, case.inputs))
    mx.eval(x)
    found = {"stock": cpu.clock(lambda: cpu.stock_product(x, case.stock)) * 1e6}
    for name, density in DENSITIES.items():
        for layer in case.layers:
            layer.set_threshold(None if density == 1 else case.thresholds[density])
        if rows == 1:
            steps = [select.prepare([layer]) for layer in case.layers]
            spent = cpu.clock(lambda steps=steps: [step(x, None)[0][0] for step in steps])
        else:
            spent = cpu.clock(lambda: [select.sparse_rows(x, [layer])[0][0] for layer in case.layers])
        found[name] = spent / len(case.layers) * 1e6
    return found


def measure(repetitions: int) -> list[dict[str, Any]]:
    """A row for each shape and number of rows: the median of each kind, and its multiple of one row."""
    table = []
    for outputs, inputs in SHAPES:
        case = cpu.Case(outputs, inputs)
        samples = [{rows: microseconds(case, rows) for rows in ROWS} for _ in range(repetitions)]
        print(f"\n{outputs} x {inputs}: us, and times one row\n")
        print("| rows | stock | all | half |\n|---|---|---|---|")
        one: dict[str, float] = {}
        for rows in ROWS:
            us = {
                kind: cpu.summary([sample[rows][kind] for sample in samples])["median"]
                for kind in ("stock", *DENSITIES)
            }
            one = one or us
            table.append({"outputs": outputs, "inputs": inputs, "rows": rows, **us})
            cells = [f"{us[kind]:.0f} ({us[kind] / one[kind]:.2f}x)" for kind in us]
            print(f"| {rows} | {' | '.join(cells)} |", flush=True)
    return table
