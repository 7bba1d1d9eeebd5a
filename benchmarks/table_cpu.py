"""Prints the Markdown tables of docs/performance.md from a result of bench_cpu.py.

python benchmarks/table_cpu.py benchmarks/results/cpu.json
"""

import json
import sys
from pathlib import Path
from typing import Any


def kernel_table(rows: list[dict[str, Any]]) -> list[str]:
    """Microseconds of single products, by density for ours, and what they are of the others."""
    lines = [
        "| outputs x inputs | threads | stock MLX us | llama.cpp us | ours us at 1, 0.5, 0.25 | x stock "
        "| x llama.cpp | bytes, of reading |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["threads"]):
        ours = [name for name in row["us"] if name.startswith("spqt")]
        cells = [
            row["shape"],
            row["threads"],
            *(time(row["us"].get(name)) for name in ("stock", "llama.cpp")),
        ]
        cells.append(", ".join(time(row["us"][name]) for name in ours))
        for other in ("stock", "llama.cpp"):
            cells.append(", ".join(f"{row['ratio'][name].get(other, '-')}" for name in ours))
        cells.append(", ".join(f"{share:.0%}" for share in row["share_of_reading"].values()))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def time(us: dict[str, float] | None) -> str:
    """A median and its quartile distance; a dash where nothing was measured."""
    return f"{us['median']:.0f} ±{us['spread']:.0f}" if us else "-"


def rate_table(rows: list[dict[str, Any]], what: str) -> list[str]:
    """Tokens per second, a line for each variant."""
    lines = [f"| {what} | threads | variant | tokens/s | spread |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["threads"]):
        for name, rate in row["tokens_per_s"].items():
            cells = [row.get("shape", "SmolLM2-135M"), row["threads"], name, rate["median"], rate["spread"]]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def main() -> None:
    result = json.loads(Path(sys.argv[1]).read_text())
    load = f"{result['load_before'][0]:.1f} before, {result['load_after'][0]:.1f} after"
    print(f"{result['machine']}; {result['kernels']}; load {load}; reading {result['read_gb_per_s']} GB/s.")
    for lines in (
        kernel_table(result["kernel"]),
        rate_table(result["prefill"], "prompt of 512"),
        rate_table(result["decode"], "decode"),
    ):
        print("", *lines, sep="\n")


if __name__ == "__main__":
    main()
