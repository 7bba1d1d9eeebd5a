"""Models held against each other by quality and by the bytes of weights that a token reads.

All are scored over the same windows, the first half of each a dense prompt, as `spqt eval` does.
Bytes are of quantized weights with 16-bit scales: what a decode step reads, so an embedding counts only
where it is the head too. `report.py` is the command.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from spqt_cli.decode import layers, session
from spqt_cli.evaluate import reference, variants
from spqt_cli.measure import many_rows, probes, scoring, texts

WINDOW, BATCH = 512, 2
SOURCE = "source"
# Settings of convert; on a model whose head is a fifth of it some pairs have about equal bytes.
RECIPES: dict[str, dict[str, Any]] = {
    "4 bits throughout": {"head_bits": 4},
    "head 5 bits (default)": {},
    "head 6 bits": {"head_bits": 6},
    "head 8 bits": {"head_bits": 8},
    "g32, head 4 bits": {"group_size": 32, "head_bits": 4},
    "g32, head 5 bits": {"group_size": 32},
    "k 8 bits, head 5": {"projections": (("k_proj", 8, 64),)},
    "mixed: q, k, v, head 5": {"projections": tuple((f"{name}_proj", 5, 64) for name in "qkv")},
    "q, k, v 6 bits, head 5": {"projections": tuple((f"{name}_proj", 6, 64) for name in "qkv")},
}


@dataclass
class Subject:
    """A model to score, dense or masked by `thresholds`.

    sizes: bytes that a dense step reads, by module; skippable: those of Zigzag layers among them.
    """

    model: nn.Module
    thresholds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sizes = quantized_bytes(self.model)
        self.skippable = self.sizes.keys() & layers.zigzag_layers(self.model).keys()
        self.masking = probes.Masking(self.thresholds)
        self.scores = scoring.Scores()

    @property
    def touched(self) -> float:
        """Bytes read per token over what was masked so far."""
        realised = self.masking.realised() if self.thresholds else {}
        return sum(size * (1 - realised.get(path, 0.0)) for path, size in self.sizes.items())


def quantized_bytes(some: nn.Module) -> dict[str, float]:
    """Path -> bytes of a quantized module that one dense decode step reads, scales as 16-bit numbers."""
    modules = [(path, one) for path, one in some.named_modules() if "scales" in one]
    has_head = any(path.rpartition(".")[2] == "lm_head" for path, _ in modules)
    return {
        path: one.weight.nbytes + 4 * one["scales"].size
        for path, one in modules
        if not (has_head and isinstance(one, nn.QuantizedEmbedding))
    }


def sparse_against_fewer_bits(
    source: str, loaded: session.Loaded, few: nn.Module, shares: list[float]
) -> dict[str, Subject]:
    """A calibrated 4-bit model dense, at the share that reads what dense 3-bit row-grouped layers do, and
    at `shares`; beside it those row-grouped layers and `few`, the model in 3-bit Zigzag.
    """
    dense, rows = Subject(loaded.model), Subject(reference.load(source, reference.settings(few)))
    body = sum(dense.sizes[path] for path in dense.skippable)
    equal = round((dense.touched - rows.touched) / body, 4)
    asked = ",".join(str(share) for share in sorted({equal, *shares}))
    sparse = {
        f"Zigzag 4-bit at {name}": Subject(loaded.model, choice.thresholds)
        for name, choice in variants.stored(loaded, asked).items()
    }
    return {
        "Zigzag 4-bit": dense, **sparse, "row-grouped 3-bit": rows, "Zigzag 3-bit": Subject(few)
    }  # fmt: skip


def windows(test: Path, tokenizer: Any, count: int) -> np.ndarray:
    """The text's first `count` windows: (count, WINDOW) tokens."""
    document = texts.read(test)
    rows = texts.windows(texts.tokens(document, tokenizer), WINDOW, texts.opening(tokenizer))
    texts.need(rows, count, document)
    return rows[:count]


def table(
    source: str, subjects: Mapping[str, Subject], rows: np.ndarray, on_progress: Callable[..., None]
) -> list[dict[str, Any]]:
    """Score the source and all subjects on rows (windows, WINDOW); print and return the results."""
    every = {SOURCE: Subject(reference.load(source)), **subjects}
    models = {id(one.model): one.model for one in every.values()}
    with ExitStack() as stack, many_rows.holding(many_rows.spare_bytes()):
        harnesses = {key: stack.enter_context(probes.probing(each)) for key, each in models.items()}
        for at in range(0, len(rows), BATCH):
            _batch(every, harnesses, mx.array(rows[at : at + BATCH]))
            on_progress(at + BATCH, len(rows), "windows")
    results = [_row(name, one) for name, one in every.items()]
    print(f"\n{'':<26}{'MB/token':>9}{'skipped':>9}{'perplexity':>17}{'KL to source':>18}{'top-1':>8}")
    for row in results:
        print(_line(row), flush=True)
    return results


def _batch(every: Mapping[str, Subject], harnesses: Mapping[int, probes.Harness], window: mx.array) -> None:
    """Score windows (B, WINDOW) by every subject; the first is what the others are held against."""
    prompt, rest = mx.split(window, [WINDOW // 2], axis=1)
    caches: dict[int, list[Any]] = {}
    references: dict[str, scoring.Reference] = {}
    for one in every.values():
        key = id(one.model)
        if key not in caches:
            caches[key] = probes.prompt_cache(one.model, prompt)
        with harnesses[key].masked(one.masking):
            log_p = scoring.log_probabilities(probes.continuation(one.model, rest[:, :-1], caches[key]))
            one.masking.evaluate()
        one.scores.add(log_p, np.array(rest[:, 1:]), references)
        references = references or {SOURCE: scoring.Reference(log_p)}


def _row(name: str, one: Subject) -> dict[str, Any]:
    perplexity, error, _ = one.scores.perplexity()
    body = sum(one.sizes[path] for path in one.skippable)
    row = {"name": name, "perplexity": perplexity, "perplexity_se": error, "bytes_per_token": one.touched}
    row["skipped"] = (sum(one.sizes.values()) - one.touched) / body if body else 0.0
    return row | ({"against": {SOURCE: asdict(one.scores.against(SOURCE))}} if name != SOURCE else {})


def _line(row: Mapping[str, Any]) -> str:
    perplexity = f"{row['perplexity']:.2f} ± {row['perplexity_se']:.2f}"
    if "against" not in row:
        return f"{row['name']:<26}{'':>18}{perplexity:>17}"
    one = row["against"][SOURCE]
    kl, skipped = f"{one['kl']:.4f} ± {one['se']:.4f}", f"{row['skipped']:.1%}" if row["skipped"] else ""
    size = row["bytes_per_token"] / 1e6
    return f"{row['name']:<26}{size:>9.2f}{skipped:>9}{perplexity:>17}{kl:>18}{one['top1']:>8.1%}"
