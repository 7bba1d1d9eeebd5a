"""The first table and picture of docs/quality.md: what fits bring, on three kinds of text, beside stock.

    python -m benchmarks.fitted SOURCE --calibration FILE --test FILE --peer dwq=FOLDER --plot FILE.png
    python -m benchmarks.fitted SOURCE --calibration FILE --test FILE --methods full --model gpu=FOLDER

SOURCE is an unquantized folder, a hub id or a .gguf file. Each method converts it at the first run, which is
timed, and calibrates it on --calibration. --test, the shipped text and Python source of the standard library
are then scored, with the source's embedding and head and once more with each model's own. Models, the
picture and progress are kept in the work folder; what is there is not made again. --model names a folder
converted elsewhere, on a GPU say: it is calibrated in place, unless it has thresholds, and scored as well.
The last line of stdout is one JSON document; --output FILE has it after each of the two scorings.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import facts, from_bare_tree

from_bare_tree()

from benchmarks import quality
from spqt_cli.calibrate import calibrate
from spqt_cli.convert import convert
from spqt_cli.evaluate import plotting, several
from spqt_cli.evaluate.variants import EvaluateOptions
from spqt_cli.fit import fit
from spqt_cli.fit.options import METHODS, FitOptions
from spqt_cli.format.folder import Folder

NONE = "none"  # plain rounding
LABELS = {NONE: "rounded"}


def main() -> None:
    options = parse()
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    python = work / "python.txt"
    facts_of_text = quality.stdlib_text(python)
    models = {method: prepared(method, options, work) for method in options.methods.split(",") if method}
    found = {"machine": facts(), "python_text": facts_of_text, "fits": {}, "heads": {}}
    for method in models:
        found["fits"][method] = json.loads((work / f"{method}.json").read_text())
    for given in options.model:
        label, _, path = given.partition("=")
        models[label] = Path(path)
        if Folder(models[label]).calibration is None:
            calibrated(models[label], options)
    for source_head in (True, False):
        wishes = several.Wishes(
            [f"{LABELS.get(method, method)}={folder}" for method, folder in models.items()],
            [options.test, python, None],
            EvaluateOptions(
                sparsity=options.sparsity, baseline=options.source, rows=True, source_head=source_head
            ),
            [int(count) for count in options.windows.split(",")],
            options.peer,
        )
        result = several.evaluate(wishes, quality.progress)
        name = "source" if source_head else "own"
        print(f"\n{name} embedding and head\n\n{result.table()}", flush=True)
        if source_head and options.plot:
            plotting.draw(result, options.plot)
        found["heads"][name] = [text(one) for one in result.texts]
        if options.output:
            options.output.write_text(json.dumps(found))
    print(json.dumps(found))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fitted",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source")
    parser.add_argument("--test", type=Path, required=True, help="text to score")
    parser.add_argument("--calibration", type=Path, required=True, help="text for thresholds")
    parser.add_argument("--work", default="fitted-work", help="folder for models and picture")
    parser.add_argument("--methods", default="none,gptq,full", help=f"of none, {', '.join(METHODS)}")
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration text")
    parser.add_argument("--sparsity", default="0.25,0.4,0.5")
    parser.add_argument("--windows", default="32,24,24", help="of --test, Python and the shipped text")
    parser.add_argument("--peer", action="append", default=[], help="LABEL=FOLDER, run dense")
    parser.add_argument("--model", action="append", default=[], help="LABEL=FOLDER, converted elsewhere")
    parser.add_argument("--plot", type=Path, help=".png, .svg or .html")
    parser.add_argument("--output", type=Path, help="the same JSON, as far as it is known")
    options = parser.parse_args()
    if unknown := set(options.methods.split(",")) - {NONE, *METHODS, ""}:
        parser.error(f"there is no method {unknown.pop()}")
    return options


def prepared(method: str, options: argparse.Namespace, work: Path) -> Path:
    """The folder of a method, converted and calibrated; what that took is in a file beside it."""
    folder, record = work / method, work / f"{method}.json"
    if not record.exists():
        minutes = None  # of a folder that was there
        wishes = convert.ConvertOptions(allow_requantize=True)
        if not folder.exists():
            started = time.monotonic()
            if method == NONE:
                convert.convert(options.source, folder, wishes, quality.progress)
            else:
                fit.convert_fitted(options.source, folder, wishes, FitOptions(method), quality.progress)
            minutes = (time.monotonic() - started) / 60
        calibrated(folder, options)
        record.write_text(json.dumps({"convert_minutes": minutes, "machine": facts()}))
    return folder


def calibrated(folder: Path, options: argparse.Namespace) -> None:
    settings = calibrate.CalibrateOptions(sparsity=0.4, data=options.calibration, tokens=options.tokens)
    calibrate.calibrate(folder, settings, quality.progress)


def text(one: Any) -> dict[str, Any]:
    """A text's variants without their windows' and layers' own figures."""
    whole = dataclasses.asdict(one)
    for variant in whole["variants"]:
        variant.pop("layers", None)
        variant.pop("window_surprise", None)
        for held in variant["against"].values():
            held.pop("windows", None)
    return whole


if __name__ == "__main__":
    main()
