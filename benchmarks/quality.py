"""The tables of docs/quality.md: what quantization costs, and what each calibration method keeps.

    python -m benchmarks.quality rows SOURCE --test FILE
    python -m benchmarks.quality methods SOURCE --calibration FILE --test FILE --sparsity 0.4,0.5
    python -m benchmarks.quality mixed SOURCE --test FILE
    python -m benchmarks.quality bytes SOURCE --test FILE --sparsity 0.25,0.4,0.5
    python -m benchmarks.quality cost SOURCE --calibration FILE --methods fast --sparsity 0.4 --tokens 4096
    python -m benchmarks.quality texts MODEL --sparsity 0.25
    python -m benchmarks.quality dwq SOURCE --calibration FILE --tokens 245760 --out FOLDER
    python -m benchmarks.quality stdlib-text OUT.txt

SOURCE is an unquantized folder, a hub id or a .gguf file. `rows` holds Zigzag against MLX's row-grouped
layout, once whole and once with the source's embedding and head in both. `methods` calibrates by each method
at each sparsity and scores all that they tried on the same windows, with the source's embedding and head;
differences from uniform are paired by window. `cost` gives the CPU time of a calibration beside that of one
dense pass over the same windows. `mixed` holds choices of bits and groups against one another, `bytes`
sparse 4 bits against dense 3 bits, both with the bytes that a token reads (quantized weights with 16-bit
scales; an embedding counts only where it is the head too). `texts` writes five greedy texts of a converted
MODEL, dense and sparse. `dwq` writes a peer for `spqt eval --peer`: stock row-grouped layers with the
converted model's bits and groups, distilled by mlx-lm's own dwq on a text or on a .npy file of token windows;
it wants a GPU. `stdlib-text` writes pieces of the running Python's standard library, a text to score that
nothing was fitted to. Converted models and progress are kept in the work folder. The last line of stdout is
one JSON document.
"""

import argparse
import hashlib
import json
import math
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from benchmarks import machine
from benchmarks.peer import dwq
from spqt_cli.backends import select
from spqt_cli.calibrate import calibrate, methods  # fmt: skip
from spqt_cli.calibrate.measurements import Candidate
from spqt_cli.calibrate.memory import InMemory
from spqt_cli.calibrate.progress import Progress
from spqt_cli.convert import convert, plan, source_model
from spqt_cli.decode import generate, layers, session
from spqt_cli.decode.options import Options, Prompt, Sampling
from spqt_cli.evaluate import compare, perplexity, variants
from spqt_cli.format import config_json, locate
from spqt_cli.measure import many_rows, probes, scoring, texts

WINDOW, BATCH = 512, 2
SCORED, UNSCORED = ("rows", "methods", "mixed", "bytes"), ("cost", "texts", "dwq", "stdlib-text")
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
# Prompts whose dense greedy text does not loop by itself at 96 tokens, so that a loop is sparsity's doing.
# Left out for looping densely: "What are the main differences between a cat and a dog as pets?"
PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper who finds a bottle on the beach.",
    "Give three tips for a good night's sleep.",
    "Give me a simple recipe for vegetable soup, step by step.",
    "Write a polite email to a colleague asking to move a meeting to Thursday.",
)


def main() -> None:
    options = parse()
    if options.table == "stdlib-text":
        print(json.dumps(stdlib_text(Path(options.source))))
        return
    tables = {
        "rows": rows_table,
        "methods": methods_table,
        "mixed": mixed_table,
        "bytes": bytes_table,
        "cost": cost_table,
        "texts": texts_table,
        "dwq": dwq_table,
    }
    found = tables[options.table](options, Path(options.work))
    print(json.dumps({"table": options.table, "setting": setting(options), "variants": found}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", choices=(*SCORED, *UNSCORED))
    parser.add_argument("source", help="SOURCE, MODEL or OUT.txt")
    parser.add_argument("--test", type=Path, help="text to score, never calibrated on")
    parser.add_argument("--calibration", type=Path, help="text to calibrate on; default: the shipped one")
    parser.add_argument("--work", default="quality-work", help="folder for the converted models")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration text")
    parser.add_argument("--sparsity", default="0.4,0.5")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, help="of `mixed`, only these")
    parser.add_argument("--max-tokens", type=int, default=96, help="of each of `texts`")
    parser.add_argument("--methods", default="auto", help="auto tries uniform too; paper is apart")
    parser.add_argument("--out", type=Path, help="of `dwq`, the folder to write")
    parser.add_argument("--epochs", type=int, default=1, help="of `dwq`")
    parser.add_argument("--learning-rate", type=float, default=dwq.Settings.learning_rate, help="of `dwq`")
    parser.add_argument("--batch", type=int, default=dwq.Settings.batch, help="of `dwq`, windows a step")
    options = parser.parse_args()
    if options.test is None and options.table in SCORED:
        parser.error("--test is needed to score on")
    if options.out is None and options.table == "dwq":
        parser.error("--out is needed to write to")
    return options


def converted(options: argparse.Namespace, work: Path, **wishes: Any) -> Path:
    """The source in the Zigzag layout, converted at the first run; wishes: over the options' settings."""
    asked = convert.ConvertOptions(**{"bits": options.bits, "group_size": options.group_size, **wishes})
    head = asked.head_bits or max(asked.bits, plan.HEAD_BITS)
    own = "".join(f"-{suffix}-{bits}bit-g{group}" for suffix, bits, group in asked.projections)
    folder = work / f"dense-{asked.bits}bit-g{asked.group_size}-head{head}{own}"
    if not folder.exists():
        convert.convert(options.source, folder, asked, progress)
    return folder


def mixed_table(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    models = {
        name: session.load(converted(options, work, **wishes), dense=True)
        for name, wishes in RECIPES.items()
        if options.recipes is None or name in options.recipes
    }
    rows = windows(options.test, next(iter(models.values())).tokenizer, options.windows)
    subjects = {name: Subject(one.model) for name, one in models.items()}
    source, *found = score(options.source, subjects, rows, progress)
    print(f"\nKL to the source below that of {found[0]['name']!r}, paired by window")
    for row in found[1:]:
        gained, error = paired(found[0], row)
        row |= {"below_first": gained, "below_first_se": error}
        print(f"{row['name']:<26}{gained:>9.4f} ± {error:.4f}")
    return [source, *found]


def bytes_table(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    folder = converted(options, work)
    if config_json.read_config(folder)["spqt"].get("calibration") is None:
        wishes = calibrate.CalibrateOptions(sparsity=0.25, data=options.calibration, tokens=options.tokens)
        calibrate.calibrate(folder, wishes, progress)
    loaded, few = (session.load(path, dense=True) for path in (folder, converted(options, work, bits=3)))
    shares = [float(share) for share in options.sparsity.split(",")]
    subjects = sparse_against_fewer_bits(options.source, loaded, few.model, shares)
    rows = windows(options.test, loaded.tokenizer, options.windows)
    return score(options.source, subjects, rows, progress)


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
    dense, rows = (
        Subject(loaded.model),
        Subject(source_model.load(source, source_model.settings_of(few))),
    )
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


def score(
    source: str, subjects: Mapping[str, Subject], rows: np.ndarray, on_progress: Callable[..., None]
) -> list[dict[str, Any]]:
    """Score the source and all subjects on rows (windows, WINDOW); print and return the results."""
    every = {SOURCE: Subject(source_model.load(source)), **subjects}
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


def rows_table(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    folder = converted(options, work)
    results = []
    for source_head in (False, True):
        wishes = variants.EvaluateOptions(
            windows=options.windows, baseline=options.source, rows=True, source_head=source_head
        )
        quality = perplexity.evaluate(folder, options.test, wishes, progress)
        print(f"\nembedding and head {'of the source' if source_head else 'quantized too'}")
        print(quality.table(), flush=True)
        results += [{"source_head": source_head, **asdict(row)} for row in quality.variants]
    return results


def methods_table(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Every method's candidates at each sparsity, all scored in one pass over the test windows."""
    loaded = session.load(converted(options, work), dense=True)
    candidates = search(options, loaded, work)
    choices = {name: variants.Choice(share, one.thresholds) for name, (share, one) in candidates.items()}
    wishes = variants.EvaluateOptions(windows=options.windows, baseline=options.source, source_head=True)
    quality = perplexity.evaluate_choices(loaded, options.test, wishes, choices, progress)
    print(f"\n{quality.table()}\n\nKL to the source below uniform's, paired by window")
    rows = {row.name: asdict(row) for row in quality.variants}
    for name, (share, one) in candidates.items():
        gained, error = paired(rows[f"uniform {share:.0%}"], rows[name])
        rows[name] |= {"held_out_kl": one.mean_kl, "below_uniform": gained, "below_uniform_se": error}
        print(
            f"{name:<16} {gained:.4f} ± {error:.4f}; on held-out calibration text {one.mean_kl:.4f} to dense"
        )
    return list(rows.values())


def cost_table(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """CPU seconds of each method at the first sparsity, all told, and of one dense pass, head left out."""
    folder = converted(options, work)
    share = float(options.sparsity.split(",")[0])
    wishes = calibrate.CalibrateOptions(share, options.calibration, options.tokens)
    loaded = session.load(folder, dense=True)
    windows = calibrate.choose_windows(loaded, texts.read(options.calibration), wishes)
    with probes.probing(loaded.model):
        start = time.process_time()
        for row in np.concatenate(windows):
            probes.prompt_cache(loaded.model, mx.array(row[None]))
        dense = time.process_time() - start
    rows = [{"name": "dense pass", "cpu_seconds": dense, "passes": 1.0}]
    del loaded
    for method in options.methods.split(","):
        with tempfile.TemporaryDirectory() as copies:
            copy = shutil.copytree(folder, Path(copies) / "model")
            start = time.process_time()
            found = calibrate.calibrate(copy, replace(wishes, method=method), progress)
            spent = time.process_time() - start
        rows.append({"name": method, "cpu_seconds": spent, "passes": spent / dense})
        rows[-1] |= {"realised": found.realised, "held_out_kl": found.tried[0].kl}
    for row in rows:
        print(f"{row['name']:<12}{row['cpu_seconds']:>8.1f} s{row['passes']:>8.2f} dense passes")
        if "realised" in row:
            print(
                f"{'':<12}realised {row['realised']:.1%}, KL to dense {row['held_out_kl']:.4f}, held-out text"
            )
    return rows


def search(
    options: argparse.Namespace, loaded: session.Loaded, work: Path
) -> dict[str, tuple[float, Candidate]]:
    """ "METHOD SHARE" -> the share and the candidate; passes over the text are shared and resumable."""
    wishes = calibrate.CalibrateOptions(data=options.calibration, tokens=options.tokens)
    text = texts.read(options.calibration)
    windows = calibrate.choose_windows(loaded, text, wishes)
    identity = {
        "model": loaded.folder.weights_fingerprint,
        "text": text.sha256,
        "tokens": options.tokens,
    }
    found = {}
    with probes.probing(loaded.model) as harness:
        saved = Progress(work, identity, restart=False)
        measurements = InMemory(loaded.model, harness, windows, saved, progress)
        for share in map(float, options.sparsity.split(",")):
            for method in options.methods.split(","):
                for one in methods.candidates(measurements, methods.METHODS[method], share):
                    found[f"{one.name} {share:.0%}"] = (share, one)
    return found


def repeats_thrice(text: str, size: int = 8) -> bool:
    """True where some run of `size` words occurs three times."""
    words = text.split()
    runs = Counter(tuple(words[at : at + size]) for at in range(len(words) - size + 1))
    return max(runs.values(), default=0) >= 3


def written(loaded: session.Loaded, prompt: str, sparsity: float, max_tokens: int) -> dict:
    """One text and the dense model's loss over it."""
    tokens = generate.encode(loaded, Prompt(prompt))
    session.set_sparsity(loaded, sparsity)
    answer: list[int] = []
    options = Options(max_tokens=max_tokens, on_token=answer.append)
    *pieces, statistics = generate.stream(loaded, tokens, Sampling(), options)
    session.set_sparsity(loaded, 0)
    text = "".join(pieces)
    perplexity = compare.perplexity(loaded, tokens, answer)
    return {
        "prompt": prompt,
        "text": text,
        "tokens": statistics.generation_tokens,
        "skipped": round(statistics.sparsity, 4),
        "perplexity_by_dense": round(perplexity, 3),
        "an_8_gram_three_times": repeats_thrice(text),
    }


def dwq_table(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Stock row-grouped layers, distilled: the folder, and the CPU seconds of a step."""
    loaded = session.load_lazily(locate.open_folder(str(converted(options, work))))
    windows = dwq.windows_of(options.calibration, loaded.tokenizer, options.tokens, WINDOW)
    settings = dwq.Settings(options.learning_rate, options.batch, epochs=options.epochs)
    start = time.process_time()
    found = dwq.distil(options.source, source_model.settings_of(loaded.model), windows, options.out, settings)
    return [{**found, "cpu_seconds": time.process_time() - start, "out": options.out.name}]


# Of the standard library of Python 3.11 to 3.13; the order is that of the text.
MODULES = (
    "argparse", "heapq", "statistics", "textwrap", "csv", "difflib", "tarfile", "shutil", "calendar",
    "fractions", "queue", "sched", "bisect", "configparser", "selectors", "zipfile", "mailbox", "pprint",
    "copy", "inspect", "locale", "gettext", "string", "tempfile", "threading", "typing", "uuid", "weakref",
    "ast", "base64", "codeop", "contextlib", "dataclasses", "dis", "fileinput", "fnmatch", "ftplib",
    "functools", "glob", "gzip", "hashlib", "hmac", "imaplib", "ipaddress", "keyword", "linecache",
    "mimetypes", "numbers", "optparse", "pathlib", "pickle",
)  # fmt: skip
PIECE_LINES = 48


def stdlib_text(output: Path) -> dict[str, Any]:
    """Write 48 lines of each of MODULES from its first definition beyond the middle on, a document each.

    Returns Python's version, the modules, and the text's bytes and SHA-256: the same for the same Python.
    """
    pieces = []
    for name in MODULES:
        path = find_spec(name).origin
        if path is None or not path.endswith(".py"):  # a package's file is its __init__.py
            sys.exit(
                f"{name} has no source here; run it with a Python of python.org, conda or a distribution"
            )
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        starts = [at for at, line in enumerate(lines) if line.startswith(("def ", "class ", "    def "))]
        first = next((at for at in starts if at >= len(lines) // 2), 0)
        pieces.append("\n".join(lines[first : first + PIECE_LINES]))
    data = "\n<|document|>\n".join(pieces).encode() + b"\n"
    output.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    return {"python": platform.python_version(), "modules": MODULES, "bytes": len(data), "sha256": digest}


def mean_perplexity(rows: list[dict]) -> float:
    losses = sum(math.log(row["perplexity_by_dense"]) * row["tokens"] for row in rows)
    return math.exp(losses / sum(row["tokens"] for row in rows))


def texts_table(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Five greedy texts at 0 and at the first sparsity, each with the dense model's perplexity of it."""
    loaded = session.load(Path(options.source))
    rows = []
    for sparsity in (0.0, float(options.sparsity.split(",")[0])):
        found = [written(loaded, prompt, sparsity, options.max_tokens) for prompt in PROMPTS]
        rows.append({"sparsity": sparsity, "mean_perplexity": mean_perplexity(found), "texts": found})
        for one in found:
            title = (
                f"{one['skipped']:.1%} skipped, perplexity by the dense model {one['perplexity_by_dense']}"
            )
            print(f"\n## {title}\n\n> {one['prompt']}\n\n{one['text'].strip()}")
    print(f"\nratio of mean perplexities: {rows[1]['mean_perplexity'] / rows[0]['mean_perplexity']:.3f}")
    return rows


def paired(first: dict[str, Any], row: dict[str, Any]) -> tuple[float, float]:
    """How much lower the row's KL is than the first's: mean and standard error over windows."""
    windows = [np.array(one["against"]["source"]["windows"]) for one in (first, row)]
    gained = windows[0] - windows[1]
    return float(gained.mean()), scoring.standard_error(gained)


def setting(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures belong to: versions, backend, commit and the options."""
    return {
        "options": {key: Path(str(value)).name for key, value in vars(options).items()},  # no machine's paths
        "backend": select.backend().name,
        "versions": {name: version(name) for name in ("spqt", "mlx", "mlx-lm", "numpy")},
        "commit": machine.commit(),
    }


def progress(done: float, total: float, what: str) -> None:
    print(f"{done:.0f}/{total:.0f} {what}", end="\r", file=sys.stderr)


if __name__ == "__main__":
    main()
