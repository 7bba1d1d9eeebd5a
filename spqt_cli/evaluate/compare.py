"""`spqt compare`: one prompt at several sparsities, with text, speed, bytes read and quality of each.

Quality is the perplexity that the dense model gives to each text after the same prompt, which needs no second
model and no reference text. Where the source is named, MLX's own row-grouped rounding of it answers too, and
all are held against the source on a text.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spqt_cli.convert import source_model
from spqt_cli.decode import context, generate, session
from spqt_cli.decode.only_mlx import check_unpatched, only_mlx
from spqt_cli.decode.options import Options, Prompt, Sampling
from spqt_cli.evaluate import several, variants
from spqt_cli.evaluate.perplexity import windows
from spqt_cli.evaluate.report import DENSE, ROWS, SOURCE, shown
from spqt_cli.format import locate, thresholds
from spqt_cli.format.folder import Folder
from spqt_cli.measure import texts
from spqt_cli.system.terminal import harmless


@dataclass(frozen=True)
class Reference:
    """What a model is held against. source: unquantized: a folder, hub id or .gguf file.

    text: a file, None for the shipped one; windows: of it.
    """

    source: str
    text: Path | None = None
    windows: int = 4


@dataclass(frozen=True)
class Divergence:
    """KL(source || row), nats per token, and its standard error over windows of a text."""

    mean: float
    se: float
    text: str
    windows: int


@dataclass
class Row:
    """One run. sparsity_target: 0 means dense. perplexity: of `text`, by the dense model.

    divergence: from the source, if one was named. stock: MLX's row-grouped model ran, not ours.
    """

    sparsity_target: float
    text: str
    statistics: generate.Statistics
    perplexity: float
    divergence: Divergence | None = None
    stock: bool = False

    @property
    def name(self) -> str:
        """In titles and tables."""
        if self.stock:
            return "stock"
        return f"{self.sparsity_target:.0%}" if self.sparsity_target else DENSE


def compare(
    path: str,
    prompt: Prompt,
    sparsities: Sequence[float],
    max_tokens: int = 96,
    on_row: Callable[[str], None] = lambda _: None,
    reference: Reference | None = None,
) -> list[Row]:
    """A row for each sparsity (0 to 0.95; 0 runs dense), greedy and so repeatable.

    max_tokens: of each text. on_row: called with the name of what runs next. reference: adds the stock row,
    first, and the KL of all. Raises UsageError for values out of range and SpqtError where a sparsity needs
    thresholds and there are none, or for a source or text that won't do, all before a weight is read.
    """
    for sparsity in sparsities:
        thresholds.check_sparsity(sparsity)
    folder = locate.open_folder(path)
    folder.thresholds(max(sparsities))
    rows, answers = [], []
    if reference is not None:
        _check(folder, reference)
        on_row("stock")
        row, answer = _stock(folder, reference.source, prompt, max_tokens)
        rows.append(row)
        answers.append(answer)
    for target in sparsities:
        answers.append([])
        options = Options(max_tokens=max_tokens, on_token=answers[-1].append)
        on_row(f"sparsity {target:.0%}" if target else "dense")
        # Loaded anew each time: a profile repacks layers for one sparsity, and there is no way back.
        loaded = session.load(folder, sparsity=target, dense=not target)
        tokens = generate.encode(loaded, prompt)
        *pieces, statistics = generate.stream(loaded, tokens, Sampling(), options)
        rows.append(Row(target, "".join(pieces), statistics, math.nan))
        del loaded
    judge = session.load(folder, dense=True)
    for row, answer in zip(rows, answers, strict=True):
        row.perplexity = perplexity(judge, generate.encode(judge, prompt), answer)
    del judge
    if reference is not None:
        on_row("divergence from the source")
        _hold_against(rows, path, reference)
    return rows


def _check(folder: Folder, reference: Reference) -> None:
    """Refuse a source, a text or a number of windows that can't work; no weight is read."""
    variants.check(variants.EvaluateOptions(windows=reference.windows))
    lazily = session.load_lazily(folder)
    variants.check_source(reference.source, lazily)
    size, _ = context.window(context.tokens(lazily.config), None, variants.WINDOW)
    windows(lazily, texts.read(reference.text), reference.windows, size)


def _stock(folder: Folder, source: str, prompt: Prompt, max_tokens: int) -> tuple[Row, list[int]]:
    """What mlx-lm answers with its own rounding of the source, bits and groups as in the folder."""
    from mlx_lm.generate import stream_generate

    ours = session.load_lazily(folder)
    tokens = generate.encode(ours, prompt)
    network = source_model.load(source, source_model.settings_of(ours.model))
    with only_mlx():
        check_unpatched(network)
        answers: list[Any] = list(stream_generate(network, ours.tokenizer, tokens, max_tokens=max_tokens))
    size, _ = several.step_bytes(network, ours.config)
    last = answers[-1]
    statistics = generate.Statistics(
        prompt_tokens=last.prompt_tokens,
        prompt_tps=last.prompt_tps,
        generation_tokens=last.generation_tokens,
        generation_tps=last.generation_tps,
        peak_memory_bytes=last.peak_memory * 1e9,
        backend="stock",
        backend_reason="MLX's own kernels, row-grouped",
        sparsity=0.0,
        weight_bytes_per_token=size,
        dense_weight_bytes_per_token=size,
        finish_reason=last.finish_reason,
    )
    text = "".join(answer.text for answer in answers)
    return Row(0.0, text, statistics, math.nan, stock=True), [answer.token for answer in answers]


def _hold_against(rows: Sequence[Row], path: str, reference: Reference) -> None:
    """Put each row's divergence from the source in its place."""
    asked = ",".join(str(row.sparsity_target) for row in rows if row.sparsity_target)
    options = variants.EvaluateOptions(
        sparsity=asked or "0", baseline=reference.source, rows=True, windows=reference.windows
    )
    wishes = several.Wishes([path], [reference.text], options, (reference.windows,))
    (found,) = several.evaluate(wishes, lambda *_: None).texts
    by_name = {one.name: one for one in found.variants}
    for row in rows:
        one = by_name[ROWS if row.stock else row.name].against[SOURCE]
        row.divergence = Divergence(one.kl, one.se, found.text, found.windows)


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
    """Each text under its figures, then a table and what its columns mean."""
    parts = []
    for row in rows:
        title = f"sparsity {row.name}" if row.sparsity_target else row.name
        parts.append(f"--- {title} ---\n{harmless(row.text.strip())}\n")
    held = rows[0].divergence
    last = "" if held is None else f"{'KL to source':>17}"
    parts.append(f"{'':>8}{'tok/s':>8}{'skipped':>9}{'MB/token':>10}{'perplexity by dense':>21}{last}")
    for row in rows:
        statistics = row.statistics
        kl = f"{row.divergence.mean:.3f} ± {shown(row.divergence.se, 3)}" if row.divergence else ""
        parts.append(
            f"{row.name:>8}{statistics.generation_tps:8.1f}{statistics.sparsity:9.1%}"
            f"{statistics.weight_bytes_per_token / 1e6:10.1f}{shown(row.perplexity, 2):>21}{kl:>17}".rstrip()
        )
        if statistics.note:
            parts.append(f"{'':>8} {statistics.note}")
    ours = rows[-1].statistics
    parts.append(f"backend {ours.backend}: {ours.backend_reason}")
    if held is not None:
        parts.append(
            "stock: the source as mlx-lm rounds it, row by row, in MLX's own kernels; nothing skipped"
        )
        parts.append(
            f"KL: nats per token, on the first {held.windows} windows of {held.text}, ± standard error"
        )
    return "\n".join(parts)
