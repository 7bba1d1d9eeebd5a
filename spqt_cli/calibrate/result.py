"""What a calibration found: the result, its stored form, its printed table."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from spqt_cli.decode import quality_warning

NAMED = 12  # layers listed by name in one line


@dataclass(frozen=True)
class LayerRow:
    """One layer's result. target, realised: fractions of its inputs to skip, and skipped on held-out text.

    threshold: on |x|, 0 where it stays dense. dead: its inputs are constant, so it stays dense. zeros:
    fraction of its inputs that are exactly 0 and skipped at any sparsity, where there are enough of
    them. unreached: the text never reached it (an expert not chosen, keys taken from another layer), so it
    stays dense. price: KL to dense, in nats, that its skipping alone would cause, from gradients; None where
    the method has none.
    """

    path: str
    target: float
    threshold: float
    realised: float
    dead: bool
    zeros: float = 0.0
    unreached: bool = False
    price: float | None = None

    def stored(self) -> dict[str, Any]:
        """The row of the table in config.json; the threshold stands in the layer's entry."""
        row: dict[str, Any] = {"target": round(self.target, 4), "realised": round(self.realised, 4)}
        facts = {"dead": self.dead, "zeros": round(self.zeros, 4), "unreached": self.unreached}
        price = {} if self.price is None else {"price": float(f"{self.price:.4g}")}
        return {**row, **price, **{name: fact for name, fact in facts.items() if fact}}


@dataclass(frozen=True)
class Tried:
    """One allocation's score on held-out text: KL to the dense quantized model in nats, its mean and
    per window; realised: fraction of all Zigzag weights skipped.
    """

    name: str
    kl: float
    windows: list[float]
    realised: float


@dataclass(frozen=True)
class Calibration:
    """What was written. tried: the allocations measured, the one in use first; realised: its fraction
    of all Zigzag weights skipped on held-out text. tokens_per_second: measured here where a speed was
    the target, else None. lossless: fraction of all Zigzag weights that exact zeros skip. note: a line
    where a method could not be followed, or "".
    """

    folder: Path
    sparsity: float
    realised: float
    method: str
    tried: list[Tried]
    text: str
    tokens: int
    held_out_tokens: int
    seconds: float
    layers: list[LayerRow]
    tokens_per_second: float | None = None
    lossless: float = 0.0
    note: str = ""

    @property
    def warning(self) -> str:
        """One line where the text will suffer, else ""."""
        return quality_warning.warning(self.tried[0].kl)


def print_table(result: Calibration, stream: TextIO) -> None:
    """Write the realised sparsity per block and projection, in percent, and the totals."""
    blocks: dict[str, dict[str, LayerRow]] = {}
    for row in reversed(result.layers):  # modules are walked from the last to the first
        parts = row.path.split(".")
        number = next((part for part in parts if part.isdigit()), "-")
        blocks.setdefault(number, {})[parts[-1]] = row
    kinds = list(dict.fromkeys(kind for cells in blocks.values() for kind in cells))
    widths = [max(len(kind), 5) for kind in kinds]
    print(
        "block " + " ".join(f"{kind:>{width}}" for kind, width in zip(kinds, widths, strict=True)),
        file=stream,
    )
    for number, cells in blocks.items():
        shown = (f"{_cell(cells.get(kind)):>{width}}" for kind, width in zip(kinds, widths, strict=True))
        print(f"{number:>5} " + " ".join(shown), file=stream)
    for line in _exceptions(result):
        print(line, file=stream)
    print(
        f"realised {result.realised:.1%} of a target of {result.sparsity:.0%} "
        f"on {result.held_out_tokens} held-out tokens",
        file=stream,
    )
    for i, one in enumerate(result.tried):
        mark = "  in use" if i == 0 else ""
        print(
            f"  {one.name:<10} KL to dense {one.kl:.4f} nats per token, realised {one.realised:.1%}{mark}",
            file=stream,
        )
    if result.tokens_per_second is not None:
        print(f"decoding ran at {result.tokens_per_second:.1f} tokens/s on this machine", file=stream)
    print(f"method {result.method}, {result.seconds:.0f} s", file=stream)
    print(_text_used(result), file=stream)


def _text_used(result: Calibration) -> str:
    """How the tokens that were run divide; the first half of each window held out is a prompt."""
    scored = result.held_out_tokens
    return (
        f"{result.tokens + 2 * scored} tokens of {result.text}: {result.tokens} to find thresholds, "
        f"{2 * scored} held out, of which {scored} are prompt and {scored} scored"
    )


def _exceptions(result: Calibration) -> list[str]:
    """What is to be said of layers that are not like the others."""
    found = []
    if dead := sum(row.dead for row in result.layers):
        found.append(f"{dead} layers with constant inputs stay dense")
    if unreached := [row.path for row in result.layers if row.unreached]:
        shown = ", ".join(unreached[:NAMED]) + (", ..." if len(unreached) > NAMED else "")
        found.append(f"{len(unreached)} layers that the text never reached stay dense: {shown}")
    if zeros := [row for row in result.layers if row.zeros]:
        found.append(
            f"exact zeros among the inputs of {len(zeros)} layers are skipped without loss at any sparsity, "
            f"{result.lossless:.1%} of the weights:"
        )
        found += [f"  {row.path} {row.zeros:.1%}" for row in reversed(zeros)]
    if result.note:
        found.append(f"note: {result.note}")
    return found


def stored_zeros(record: Mapping[str, Any]) -> str:
    """A line on exact zeros for what config.json says of a calibration; "" where there are none."""
    rows = record.get("layers")
    zeros = (
        [row.get("zeros") for row in rows.values() if isinstance(row, dict)] if isinstance(rows, dict) else []
    )
    found = [zero for zero in zeros if isinstance(zero, (int, float))]
    if not found:
        return ""
    return (
        f"exact zeros in {len(found)} layers, {min(found):.0%} to {max(found):.0%} of their inputs: "
        "skipped without loss at any sparsity"
    )


def _cell(row: LayerRow | None) -> str:
    if row is None:
        return ""
    return "dead" if row.dead else "-" if row.unreached else f"{row.realised:.1%}"
