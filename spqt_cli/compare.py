"""One prompt at several sparsities, side by side: text, speed, bytes, and what the text cost.

The cost is the dense model's perplexity of each text: how surprising the dense model, run over the
same prompt, finds what was written. It needs no second model and no reference text.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from spqt_cli import generate, identity, model, source
from spqt_cli.terminal import harmless


@dataclass
class Row:
    """One run. sparsity_target: 0 means dense. perplexity: of `text`, by the dense model."""

    sparsity_target: float
    text: str
    statistics: generate.Statistics
    perplexity: float


def compare(
    path: str,
    prompt: generate.Prompt,
    sparsities: Sequence[float],
    max_tokens: int = 96,
    on_row: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """A row for each sparsity, greedy and so repeatable. on_row: told what runs next.

    Raises SpqtError before any weight is read where a sparsity needs thresholds and there are none.
    """
    folder = source.local_folder(path)
    model.calibrated_share(identity.check_model(folder), folder, max(sparsities))
    loaded = model.load(path, dense=True)
    tokens = generate.encode(loaded, prompt)
    rows = []
    for target in sparsities:
        on_row(f"sparsity {target:.0%}" if target else "dense")
        if target:
            model.set_sparsity(loaded, target)
        *pieces, statistics = generate.stream(
            loaded, tokens, generate.Sampling(), generate.Options(max_tokens=max_tokens)
        )
        model.set_dense(loaded)
        text = "".join(pieces)
        rows.append(Row(target, text, statistics, perplexity(loaded, tokens, text)))
    return rows


def perplexity(loaded: model.Loaded, prompt_tokens: list[int], text: str) -> float:
    """exp of the mean negative log-likelihood per token of `text` after the prompt, by `loaded` as set."""
    import mlx.core as mx
    import mlx.nn as nn

    answer = loaded.tokenizer.encode(text, add_special_tokens=False)
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
            f"{statistics.weight_bytes_per_token / 1e6:9.1f} {row.perplexity:20.2f}"
        )
    parts.append(f"backend {rows[0].statistics.backend}: {rows[0].statistics.backend_reason}")
    return "\n".join(parts)
