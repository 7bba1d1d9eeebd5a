"""`spqt compare`: one prompt at several sparsities, with text, speed, bytes read and quality of each.

Quality is the perplexity that the dense model gives to each text after the same prompt. It needs no second
model and no reference text.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from spqt_cli.decode import generate, session
from spqt_cli.decode.options import Options, Prompt, Sampling
from spqt_cli.evaluate.report import shown
from spqt_cli.format import locate, thresholds
from spqt_cli.system.terminal import harmless


@dataclass
class Row:
    """One run. sparsity_target: 0 means dense. perplexity: of `text`, by the dense model."""

    sparsity_target: float
    text: str
    statistics: generate.Statistics
    perplexity: float


def compare(
    path: str,
    prompt: Prompt,
    sparsities: Sequence[float],
    max_tokens: int = 96,
    on_row: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """A row for each sparsity (0 to 0.95; 0 runs dense), greedy and so repeatable.

    max_tokens: of each text. on_row: called with the name of what runs next. Raises UsageError for values out
    of range and SpqtError where a sparsity needs thresholds and there are none, both before a weight is read.
    """
    for sparsity in sparsities:
        thresholds.check_sparsity(sparsity)
    answers: list[list[int]] = [[] for _ in sparsities]
    options = [Options(max_tokens=max_tokens, on_token=answer.append) for answer in answers]
    folder = locate.open_folder(path)
    folder.thresholds(max(sparsities))
    rows = []
    for target, asked in zip(sparsities, options, strict=True):
        on_row(f"sparsity {target:.0%}" if target else "dense")
        # Loaded anew each time: a profile repacks layers for one sparsity, and there is no way back.
        loaded = session.load(folder, sparsity=target, dense=not target)
        tokens = generate.encode(loaded, prompt)
        *pieces, statistics = generate.stream(loaded, tokens, Sampling(), asked)
        rows.append(Row(target, "".join(pieces), statistics, math.nan))
        del loaded
    judge = session.load(folder, dense=True)
    for row, answer in zip(rows, answers, strict=True):
        row.perplexity = perplexity(judge, generate.encode(judge, prompt), answer)
    return rows


def perplexity(loaded: session.Loaded, prompt_tokens: list[int], answer: list[int]) -> float:
    """exp of the mean negative log-likelihood per token of an answer after its prompt, by `loaded` as set.

    answer: the tokens as they were written; NaN where there are none.
    """
    import mlx.core as mx
    import mlx.nn as nn

    if not answer:
        return math.nan
    ids = mx.array([prompt_tokens + answer])
    logits = loaded.model(ids[:, :-1])[0, len(prompt_tokens) - 1 :]
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), mx.array(answer))
    return float(mx.exp(losses.mean()))


def as_dict(row: Row) -> dict[str, object]:
    """A row as plain values, for JSON."""
    return asdict(row)


def report(rows: Sequence[Row]) -> str:
    """Each text under its figures, then a table; costs are against the first row."""
    parts = []
    for row in rows:
        title = f"sparsity {row.sparsity_target:.0%}" if row.sparsity_target else "dense"
        parts.append(f"--- {title} ---\n{harmless(row.text.strip())}\n")
    parts.append(f"{'':>8} {'tok/s':>7} {'skipped':>8} {'MB/token':>9} {'perplexity by dense':>20}")
    for row in rows:
        statistics = row.statistics
        name = f"{row.sparsity_target:.0%}" if row.sparsity_target else "dense"
        parts.append(
            f"{name:>8} {statistics.generation_tps:7.1f} {statistics.sparsity:8.1%} "
            f"{statistics.weight_bytes_per_token / 1e6:9.1f} {shown(row.perplexity, 2):>20}"
        )
        if statistics.note:
            parts.append(f"{'':>8} {statistics.note}")
    parts.append(f"backend {rows[0].statistics.backend}: {rows[0].statistics.backend_reason}")
    return "\n".join(parts)
