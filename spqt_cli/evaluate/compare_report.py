"""What a comparison found, for people: texts, a table with a footnote for each column, and a verdict."""

from collections.abc import Sequence

from spqt_cli.decode import quality_warning
from spqt_cli.evaluate.compare import Row
from spqt_cli.evaluate.report import shown
from spqt_cli.system.terminal import harmless

LEAST_GAIN = 1.02  # times as fast, in every round: less is no reason to change a text


def report(rows: Sequence[Row]) -> str:
    """Each text under its name, the table, its footnotes, the verdict."""
    texts = [f"--- {_title(row)} ---\n{harmless(row.text.strip())}\n" for row in rows]
    return "\n".join([*texts, *_table(rows), "", *_footnotes(rows), "", verdict(rows)])


def _title(row: Row) -> str:
    return f"sparsity {row.name}" if row.sparsity_target else row.name


def _table(rows: Sequence[Row]) -> list[str]:
    held = next((row.divergence for row in rows if row.divergence), None)
    last = "" if held is None else f"{f'KL to {held.reference}':>17}"
    lines = [f"{'':>8}{'tok/s':>8}{'range':>16}{'skipped':>9}{'MB/token':>10}{'perplexity':>12}{last}"]
    for row in rows:
        kl = f"{row.divergence.mean:.3f} ± {shown(row.divergence.se, 3)}" if row.divergence else ""
        span = f"{min(row.speeds.rounds):.1f} to {max(row.speeds.rounds):.1f}"
        statistics = row.statistics
        lines.append(
            f"{row.name:>8}{row.speeds.median:8.1f}{span:>16}{statistics.sparsity:9.1%}"
            f"{statistics.weight_bytes_per_token / 1e6:10.1f}{shown(row.perplexity, 2):>12}{kl:>17}".rstrip()
        )
        if statistics.note:
            lines.append(f"{'':>8} {statistics.note}")
    return lines


def _footnotes(rows: Sequence[Row]) -> list[str]:
    rounds, ours = len(rows[0].speeds.rounds), rows[-1].statistics
    held = next((row.divergence for row in rows if row.divergence), None)
    lines = [
        f"tok/s: median and range of {rounds} rounds by turns, {rows[0].timed_tokens} tokens each, after one "
        f"that warms up; backend {ours.backend} ({ours.backend_reason})",
        "skipped: of the Zigzag weights, while the text above was written",
        "MB/token: weights read for each token; more than the files where some are converted at load, as a "
        "tied head's scales are on a CPU",
        "perplexity: of the text above, by the dense model; low for a text that repeats itself",
    ]
    if held is not None:
        count = f"{held.windows} windows" if held.windows > 1 else "window"
        lines.append(
            f"KL to {held.reference}: nats per token, the first {count} of {held.text}, "
            f"± standard error; over {quality_warning.SUFFERS:g} to dense the text suffers"
        )
    if rows[0].stock:
        lines.append("stock: the source as mlx-lm rounds it, row by row, in MLX's own kernels")
    return lines


def verdict(rows: Sequence[Row]) -> str:
    """What skipping gains on this model and machine, and what it costs: a sentence, and one on stock."""
    dense = next((row for row in rows if not row.stock and not row.sparsity_target), None)
    sparse = [row for row in rows if row.sparsity_target]
    parts = []
    if dense is not None and sparse:
        parts.append(_gain(max(sparse, key=lambda row: row.speeds.ratio), dense))
    if rows[0].stock:
        best = max(rows[1:], key=lambda row: row.speeds.median)
        times = best.speeds.median / rows[0].speeds.median
        parts.append(f"{_title(best).capitalize()} runs at {times:.2f} times stock's speed.")
    return " ".join(parts) or "Nothing to compare: name 0 (dense) and other sparsities."


def _gain(best: Row, dense: Row) -> str:
    ratios = best.speeds.ratios
    span = f"{min(ratios):.2f} to {max(ratios):.2f} times dense in {len(ratios)} rounds"
    saved = 1 - best.statistics.weight_bytes_per_token / dense.statistics.weight_bytes_per_token
    cost = ""
    if best.kl_to_dense is not None:
        means = quality_warning.judged(best.kl_to_dense)
        cost = f" It costs a KL of {best.kl_to_dense:.3f} to dense: {means}."
    if min(ratios) >= LEAST_GAIN:
        found = f"Skipping gains here: at {best.name} {best.speeds.ratio:.2f} times as fast as dense"
    elif max(ratios) < 1:
        found = f"Skipping does not gain here: at {best.name} it is slower than dense"
        cost = " Run this model with --dense on this machine."
    else:
        found = f"Skipping gains nothing that is sure here: at {best.name} about as fast as dense"
    return f"{found} ({span}), with {saved:.0%} fewer bytes a token.{cost}"
