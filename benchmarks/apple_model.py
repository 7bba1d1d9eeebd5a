"""A paper model of decode kernels on Apple GPUs. Everything it prints about our kernels is a PREDICTION.

    python benchmarks/apple_model.py                   # the fit, then predictions for every chip
    python benchmarks/apple_model.py --compare FILE    # beside what `spqt bench --kernel --json` measured

Time of one projection = launches + the larger of (memory lines / bandwidth) and (instructions / ALU rate).
Launch cost and the reachable share of the bandwidth come from the dense rows of one public table, in
apple_fit.py; its sparse rows were not fitted and show how far to trust the model. Written without a Mac.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apple_fit import (
    CHIPS,
    DENSITIES,
    PUBLIC,
    PUBLIC_CHIP,
    Chip,
    Fit,
    best_line,
    fit,
    fit_report,
    matrix_bytes,
    public_us,
    rms,
    touched,
)

from spqt_cli.bench import shapes
from spqt_cli.format import layout

INSTRUCTIONS = 4  # per weight: mask, set exponent, subtract, multiply-add (metal/sparse_gemv.metal)


@dataclass(frozen=True)
class Prediction:
    """Of one launch: its parts in microseconds."""

    launch_us: float
    memory_us: float
    alu_us: float

    @property
    def us(self) -> float:
        return self.launch_us + max(self.memory_us, self.alu_us)


def predict(
    chip: Chip, found: Fit, sizes: Sequence[tuple[int, int]], density: float | None, line: int,
    form: tuple[int, int] = (4, 64),
) -> Prediction:  # fmt: skip
    """One call on projections (outputs, inputs) of one input, weights not in a cache.

    density: share of active channels; None: stock's dense product, one launch for each projection.
    form: bits and group size.
    """
    if density is None:
        read: float = sum(matrix_bytes(*size, *form) for size in sizes)
    else:
        bands = [layout.band_of(outputs, form[1]) for outputs, _ in sizes]
        read = sum(touched(*size, density, band, line, form) for size, band in zip(sizes, bands, strict=True))
    weights = sum(outputs * inputs for outputs, inputs in sizes) * (1.0 if density is None else density)
    # Ours always counts two launches, the product and the sum over stripes.
    launches = len(sizes) if density is None else 2
    return Prediction(
        found.launch_us * launches,
        read / (found.share * chip.gb_per_s * 1e3),
        weights * INSTRUCTIONS / chip.instructions_per_s * 1e6,
    )


def units(shape: str) -> list[list[tuple[int, int]]]:
    """The products of one block of a model, each a list of (outputs, inputs) that share a launch."""
    c = shapes.config(shape)
    hidden, inner = int(c["hidden_size"]), int(c["intermediate_size"])
    q, kv = (int(c[name] * c["head_dim"]) for name in ("num_attention_heads", "num_key_value_heads"))
    return [
        [(q, hidden), (kv, hidden), (kv, hidden)],
        [(hidden, q)],
        [(inner, hidden)] * 2,
        [(hidden, inner)],
    ]


def token_ms(chip: Chip, found: Fit, shape: str, density: float | None, line: int) -> float:
    """Milliseconds that the weights of one token take: all blocks, and the head, which is always dense.

    Launches are left out: in a decode step they are queued ahead, and the table says nothing of that
    case. So are attention, norms and the host. The ratio of two of these is an upper bound.
    """
    c = shapes.config(shape)
    block = sum(
        max(p.memory_us, p.alu_us) for p in (predict(chip, found, u, density, line) for u in units(shape))
    )
    head = predict(chip, found, [(int(c["vocab_size"]), int(c["hidden_size"]))], None, line)
    return (block * c["num_hidden_layers"] + head.memory_us) / 1e3


def report(shape: str) -> str:
    """The fit with its errors, and the predictions for every chip, as markdown."""
    found = fit()
    line = best_line(found)
    calls, tokens = [], []
    for name, chip in CHIPS.items():
        for sizes in units(shape):
            stock = predict(chip, found, sizes, None, line)
            ours = [predict(chip, found, sizes, density, line) for density in (1.0, 0.75, 0.5, 0.25)]
            times = [f"{one.us:.0f}" for one in (stock, *ours)]
            alu = f"{ours[2].alu_us / ours[2].memory_us:.0%}"
            calls.append([name, _names(sizes), *times, f"{stock.us / ours[2].us:.2f}", alu])
        ms = [token_ms(chip, found, shape, density, line) for density in (None, 1.0, 0.75, 0.5)]
        tokens.append([name, *(f"{one:.1f}" for one in ms), *(f"{ms[0] / one:.2f}" for one in ms[2:])])
    per_call = ["chip", "projections", "stock", "0 % skipped", "25 %", "50 %", "75 %"]
    per_token = ["chip", "stock", "0 % skipped", "25 %", "50 %", "at most, 25 %", "at most, 50 %"]
    return "\n\n".join([
        fit_report(found),
        f"us per call on the {PUBLIC_CHIP}, table (model):",
        _table(["outputs x inputs", "stock", "half active", "quarter active"], _public(found, line)),
        f"PREDICTION, not a measurement: {shape}, 4 bits, group 64, us per call, weights in memory.",
        _table([*per_call, "stock / ours at 50 %", "ALU / memory at 50 %"], calls),
        "PREDICTION: ms a token for the weights alone (no launches, attention, norms or host), and the\n"
        "ratio to stock that this would allow at most.",
        _table(per_token, tokens),
    ])  # fmt: skip


def _public(found: Fit, line: int) -> list[list[str]]:
    """Rows of the public table, each time with the model's beside it."""
    return [
        [f"{shape[0]} x {shape[1]}"]
        + [f"{us} ({public_us(found, shape, d, line):.0f})" for us, d in zip(row, DENSITIES, strict=True)]
        for shape, row in PUBLIC.items()
    ]


def _names(sizes: Sequence[tuple[int, int]]) -> str:
    return "+".join(f"{outputs}x{inputs}" for outputs, inputs in sizes)


def compare(document: dict[str, Any], chip_name: str | None) -> str:
    """Measured kernel rows of `spqt bench --kernel --json` beside the model's, as markdown."""
    device = str(document["machine"]["device"])
    name = chip_name or device.removeprefix("Apple ").strip()
    if name not in CHIPS:
        raise SystemExit(f"no chip {name!r}; give one with --chip: {', '.join(CHIPS)}")
    found = fit()
    line = best_line(found)
    form = (document["settings"].get("bits", 4), document["settings"].get("group_size", 64))
    rows, errors = [], []
    for row in document["rows"]:
        sizes = [(int(o), int(i)) for o, i in (part.split("x") for part in row["shape"].split("+"))]
        if row["variant"] not in ("stock", "zigzag dense") and row["sparsity"] is None:
            continue  # a kernel that the model knows nothing of
        density = None if row["variant"] == "stock" else 1 - row["sparsity"]
        predicted = predict(CHIPS[name], found, sizes, density, line, form).us
        measured = row["time"]["median"]
        errors.append(math.log(measured / predicted))
        rows.append(
            [row["unit"], row["shape"], row["variant"], f"{predicted:.1f}", f"{measured:.1f}",
             f"{measured / predicted:.2f}"]
        )  # fmt: skip
    title = f"{device} as {name}: PREDICTED and measured us per call"
    typical = f"typical factor between the two: {math.exp(rms(errors)):.2f}"
    header = ["unit", "outputs x inputs", "variant", "predicted", "measured", "measured / predicted"]
    return "\n\n".join([title, _table(header, rows), typical])


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Print the predictions, or a measured file beside them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-3-8b", choices=shapes.names())
    parser.add_argument("--compare", type=Path, metavar="FILE", help="output of spqt bench --kernel --json")
    parser.add_argument("--chip", choices=CHIPS, help="where the file's device does not tell it")
    arguments = parser.parse_args()
    if arguments.compare is None:
        print(report(arguments.shape))
    else:
        print(compare(json.loads(arguments.compare.read_text(encoding="utf-8")), arguments.chip))


if __name__ == "__main__":
    main()
