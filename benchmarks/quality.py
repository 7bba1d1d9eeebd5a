"""The tables of docs/quality.md: what quantization costs, and what each calibration method keeps.

    python benchmarks/quality.py rows SOURCE --test FILE
    python benchmarks/quality.py methods SOURCE --calibration FILE --test FILE --sparsity 0.4,0.5
    python benchmarks/quality.py mixed SOURCE --test FILE
    python benchmarks/quality.py bytes SOURCE --test FILE --sparsity 0.25,0.4,0.5
    python benchmarks/quality.py cost SOURCE --calibration FILE --methods fast --sparsity 0.4 --tokens 4096

SOURCE is an unquantized folder, a hub id or a .gguf file. `rows` holds Zigzag against MLX's
row-grouped layout, once whole and once with the source's embedding and head in both. `methods`
calibrates by each method at each sparsity and scores all that they tried on the same windows, with
the source's embedding and head; differences from uniform are paired by window. `cost` gives the CPU time
of a calibration beside that of one dense pass over the same windows. `mixed` holds choices of bits and
groups against one another, `bytes` sparse 4 bits against dense 3 bits, both with the bytes that a token
reads. Converted models and progress are kept in the work folder. The last line of stdout is one JSON
document.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import quality_bytes

from spqt_cli.backends import select
from spqt_cli.calibrate import calibrate, methods  # fmt: skip
from spqt_cli.calibrate.measurements import Workbench
from spqt_cli.calibrate.progress import Progress
from spqt_cli.convert import convert, plan
from spqt_cli.decode import session
from spqt_cli.evaluate import evaluate
from spqt_cli.format import config_json, thresholds
from spqt_cli.measure import probes, scoring, texts


def main() -> None:
    options = parse()
    tables = {
        "rows": rows_table,
        "methods": methods_table,
        "mixed": mixed_table,
        "bytes": bytes_table,
        "cost": cost_table,
    }
    variants = tables[options.table](options, Path(options.work))
    print(json.dumps({"table": options.table, "setting": setting(options), "variants": variants}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=("rows", "methods", "mixed", "bytes", "cost"))
    parser.add_argument("source")
    parser.add_argument("--test", type=Path, help="text to score, never calibrated on")
    parser.add_argument("--calibration", type=Path, help="text to calibrate on; default: the shipped one")
    parser.add_argument("--work", default="quality-work", help="folder for the converted models")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration text")
    parser.add_argument("--sparsity", default="0.4,0.5")
    parser.add_argument("--recipes", nargs="+", choices=quality_bytes.RECIPES, help="of `mixed`, only these")
    parser.add_argument("--methods", default="auto", help="auto tries uniform too; paper is apart")
    options = parser.parse_args()
    if options.test is None and options.table != "cost":
        parser.error("--test is needed to score on")
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
        for name, wishes in quality_bytes.RECIPES.items()
        if options.recipes is None or name in options.recipes
    }
    rows = quality_bytes.windows(options.test, next(iter(models.values())).tokenizer, options.windows)
    subjects = {name: quality_bytes.Subject(one.model) for name, one in models.items()}
    source, *found = quality_bytes.table(options.source, subjects, rows, progress)
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
    subjects = quality_bytes.sparse_against_fewer_bits(options.source, loaded, few.model, shares)
    rows = quality_bytes.windows(options.test, loaded.tokenizer, options.windows)
    return quality_bytes.table(options.source, subjects, rows, progress)


def rows_table(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    folder = converted(options, work)
    results = []
    for source_head in (False, True):
        wishes = evaluate.EvaluateOptions(
            windows=options.windows, baseline=options.source, rows=True, source_head=source_head
        )
        quality = evaluate.evaluate(folder, options.test, wishes, progress)
        print(f"\nembedding and head {'of the source' if source_head else 'quantized too'}")
        print(evaluate.report(quality), flush=True)
        results += [{"source_head": source_head, **asdict(row)} for row in quality.variants]
    return results


def methods_table(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Every method's candidates at each sparsity, all scored in one pass over the test windows."""
    loaded = session.load(converted(options, work), dense=True)
    candidates = search(options, loaded, work)
    choices = {name: evaluate.Choice(share, one.chosen) for name, (share, one) in candidates.items()}
    wishes = evaluate.EvaluateOptions(windows=options.windows, baseline=options.source, source_head=True)
    quality = evaluate.evaluate_choices(loaded, options.test, wishes, choices, progress)
    print(f"\n{evaluate.report(quality)}\n\nKL to the source below uniform's, paired by window")
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
) -> dict[str, tuple[float, methods.Candidate]]:
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
        bench = Workbench(loaded.model, harness, windows, Progress(work, identity, restart=False))
        counts = bench.histograms(step)
        live = {path: seen for path, seen in counts.items() if not thresholds.is_dead(seen)}
        for share in map(float, options.sparsity.split(",")):
            for method in options.methods.split(","):
                for one in methods.Search(bench, live, share).run(method, step):
                    found[f"{one.name} {share:.0%}"] = (share, one)
    return found


def paired(first: dict[str, Any], row: dict[str, Any]) -> tuple[float, float]:
    """How much lower the row's KL is than the first's: mean and standard error over windows."""
    windows = [np.array(one["against"]["source"]["windows"]) for one in (first, row)]
    gained = windows[0] - windows[1]
    return float(gained.mean()), scoring.standard_error(gained)


def setting(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures belong to: versions, backend, commit and the options."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return {
        "options": {key: Path(str(value)).name for key, value in vars(options).items()},  # no machine's paths
        "backend": select.backend().name,
        "versions": {name: version(name) for name in ("spqt", "mlx", "mlx-lm", "numpy")},
        "commit": commit.stdout.strip(),
    }


def step(what: str) -> None:
    print(what.ljust(60), end="\r", file=sys.stderr)


def progress(done: float, total: float, what: str) -> None:
    print(f"{done:.0f}/{total:.0f} {what}", end="\r", file=sys.stderr)


if __name__ == "__main__":
    main()
