"""`spqt eval`: its flags."""

from pathlib import Path
from typing import Annotated

import typer

from spqt_cli.cli import flags
from spqt_cli.cli.flags import Json, ModelArgument, Quiet
from spqt_cli.cli.output import as_json, progress, say_written
from spqt_cli.errors import UsageError

USAGE = "spqt eval MODEL TEXT"


def evaluate(
    model: ModelArgument = None,
    text: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="TEXT",
            help="UTF-8 texts that were not used to calibrate; or questions: a .jsonl file.",
            readable=False,
        ),
    ] = None,
    model_option: Annotated[
        list[str] | None,
        typer.Option(
            "--model", help="The model, as an option; several times for several, also LABEL=FOLDER."
        ),
    ] = None,
    shipped: Annotated[bool, typer.Option("--shipped", help="Score the shipped text as well.")] = False,
    windows: Annotated[
        str, typer.Option(help="Windows of the text to score; of several texts also one number each: 32,24.")
    ] = "8",
    limit: Annotated[int | None, typer.Option(help="Of a .jsonl file, only so many questions.")] = None,
    sparsity: Annotated[
        str | None, typer.Option(help="A sparsity, a list, or a sweep such as 0.1:0.7:0.1.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="The unquantized source, to compare with as well.")
    ] = None,
    rows: Annotated[bool, typer.Option(help="Also measure MLX's row-grouped form of the source.")] = False,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="Also score any mlx-lm folder, dense; several times, also LABEL=FOLDER."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Hold all against this variant, paired by window. [default: row-grouped]"
        ),
    ] = None,
    source_head: Annotated[bool, typer.Option(help="Take embedding and head from the source.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw KL over MB per token: .png, .svg or .html; '-' for the terminal.",
            readable=False,
        ),
    ] = None,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Measure what quantization and sparsity cost: on texts, or on multiple-choice questions.

    Several texts, models or peers give a table per text: KL to the source, MB read per token, and each
    variant less one of them, paired by window.

    Questions: a .jsonl file of HellaSwag's shape (ctx, endings, label) or PIQA's (goal, sol1, sol2, label).
    """
    models, files = flags.with_texts(model, text or [], model_option or [], USAGE, shipped=shipped)
    from spqt_cli.evaluate import multiple_choice, perplexity, plotting, questions, several
    from spqt_cli.evaluate.report import Quality, Result
    from spqt_cli.evaluate.several_report import Several
    from spqt_cli.evaluate.variants import EvaluateOptions

    counts = _counts(windows)
    options = EvaluateOptions(
        windows=counts[0],
        sparsity=sparsity,
        baseline=baseline,
        rows=rows,
        source_head=source_head,
        limit=limit,
    )
    asked = [file for file in files if questions.is_questions(file)]
    if limit is not None and not asked:
        raise UsageError("--limit counts the questions of a .jsonl file", "of a text use --windows")
    called = several.labelled(models)
    of_texts = bool(peer or plot) or against is not None
    result: Quality | Result | Several
    with progress(quiet or json_output) as on_progress:
        if asked:
            if len(files) > 1 or shipped or of_texts:
                raise UsageError(
                    "questions are answered a file at a time", "spqt eval FILE.jsonl --model MODEL"
                )
            result = multiple_choice.evaluate_several(called, files[0], options, on_progress)
        elif len(models) + len(files) + shipped > 2 or of_texts:
            if plot is not None:
                plotting.check(plot, baseline, json_output)
            scored = [*files, *([None] if shipped else [])]
            wishes = several.Wishes(models, scored, options, counts, peer or [], against)
            result = several.evaluate(wishes, on_progress)
        else:
            (model,) = called.values()
            result = perplexity.evaluate(model, files[0] if files else None, options, on_progress)
    typer.echo(as_json(result) if json_output else result.table())
    if plot is not None and isinstance(result, Several):
        plotting.draw(result, plot)
        say_written(plot, quiet or json_output)


def _counts(asked: str) -> list[int]:
    """ "32" -> [32]; "32,24" -> [32, 24]."""
    try:
        return [int(part) for part in asked.split(",")]
    except ValueError:
        raise UsageError(f"--windows {asked!r} is no number", "8, or one for each text: 32,24") from None
