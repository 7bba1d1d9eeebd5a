"""What a calibration found: the result, its stored form, its printed table."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

# KL to the dense model, in nats on held-out text, above which a warning is printed. On SmolLM2-135M 25 % cost
# 0.05 (perplexity +3.5 %), 40 % 0.14 (+13 %), 50 % 0.31 (+34 %): KL is about the logarithm of the rise.
# At 0.1 perplexity is up by a tenth, between what reads well there and what does not (docs/quality.md).
SUFFERS = 0.1
NAMED = 12  # layers listed by name in one line


@dataclass(frozen=True)
class LayerRow:
    """One layer's result. target, realised: fractions of its inputs to skip, and skipped on held-out text.

    threshold: on |x|, 0 where it stays dense. dead: its inputs are constant, so it stays dense. zeros:
    fraction of its inputs that are exactly 0 and skipped at any sparsity, where there are enough of
    them. unreached: the text never reached it (an expert not chosen, keys taken from another layer), so it
    stays dense.
    """

    path: str
    target: float
    threshold: float
    realised: float
    dead: bool
    zeros: float = 0.0
    unreached: bool = False

    def stored(self) -> dict[str, Any]:
        """The row of the table in config.json; the threshold stands in the layer's entry."""
        row: dict[str, Any] = {"target": round(self.target, 4), "realised": round(self.realised, 4)}
        facts = {"dead": self.dead, "zeros": round(self.zeros, 4), "unreached": self.unreached}
        return {**row, **{name: fact for name, fact in facts.items() if fact}}


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
        return warning(self.tried[0].kl)


def warning(kl: float) -> str:
    """One line where a KL to the dense model, in nats on held-out text, means worse text; else ""."""
    if kl <= SUFFERS:
        return ""
    return (
        f"warning: the text will suffer: KL to dense {kl:.2f} on held-out text, perplexity about "
        f"{math.expm1(min(kl, 10)):+.0%}; a lower --sparsity, or --max-kl {SUFFERS:g}, keeps more"
    )


def stored_warning(section: Any) -> str:
    """The warning for what config.json says of a calibration; "" where it says nothing of KL."""
    kl = section.get("kl") if isinstance(section, dict) else None
    return warning(kl) if isinstance(kl, (int, float)) else ""


def warning_of(config: dict[str, Any], sparsity: float | None) -> str:
    """The warning for a model that runs at `sparsity`, if that is what was calibrated, or more; else ""."""
    section = config["spqt"].get("calibration") or {}
    skips_as_much = sparsity is not None and sparsity >= section.get("sparsity", math.inf)
    return stored_warning(section) if skips_as_much else ""


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
        print(f"  {one.name:<10} KL to dense {one.kl:.4f}, realised {one.realised:.1%}{mark}", file=stream)
    if result.tokens_per_second is not None:
        print(f"decoding ran at {result.tokens_per_second:.1f} tokens/s on this machine", file=stream)
    source = f"{result.tokens} tokens of {result.text}"
    print(f"method {result.method}, {source}, {result.seconds:.0f} s", file=stream)


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


def stored_zeros(section: Any) -> str:
    """A line on exact zeros for what config.json says of a calibration; "" where there are none."""
    rows = section.get("layers") if isinstance(section, dict) else None
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
