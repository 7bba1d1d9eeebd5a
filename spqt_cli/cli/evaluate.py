"""`spqt eval`: its flags."""

from pathlib import Path
from typing import Annotated

import typer

from spqt_cli.cli import flags
from spqt_cli.cli.flags import Json, ModelArgument, ModelOption, Quiet
from spqt_cli.cli.output import as_json, progress
from spqt_cli.errors import UsageError


def evaluate(
    model: ModelArgument = None,
    text: Annotated[
        Path | None,
        typer.Argument(
            metavar="TEXT",
            help="A UTF-8 text that was not used to calibrate; or questions: a .jsonl file.",
            readable=False,
        ),
    ] = None,
    model_option: ModelOption = None,
    windows: Annotated[int, typer.Option(help="Windows of the text to score.")] = 8,
    limit: Annotated[int | None, typer.Option(help="Of a .jsonl file, only so many questions.")] = None,
    sparsity: Annotated[
        str | None, typer.Option(help="A sparsity, a list, or a sweep such as 0.1:0.7:0.1.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="The unquantized source, to compare with as well.")
    ] = None,
    rows: Annotated[bool, typer.Option(help="Also measure MLX's row-grouped form of the source.")] = False,
    source_head: Annotated[bool, typer.Option(help="Take embedding and head from the source.")] = False,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Measure what quantization and sparsity cost: on a text, or on multiple-choice questions.

    Questions: a .jsonl file of HellaSwag's shape (ctx, endings, label) or PIQA's (goal, sol1, sol2, label).
    """
    model, file = flags.with_text(model, text, model_option, "spqt eval MODEL TEXT")
    from spqt_cli.evaluate import multiple_choice, perplexity, questions
    from spqt_cli.evaluate.report import Quality, Result
    from spqt_cli.evaluate.variants import EvaluateOptions

    options = EvaluateOptions(
        windows=windows,
        sparsity=sparsity,
        baseline=baseline,
        rows=rows,
        source_head=source_head,
        limit=limit,
    )
    if limit is not None and not questions.is_questions(file):
        raise UsageError("--limit counts the questions of a .jsonl file", "of a text use --windows")
    result: Quality | Result
    with progress(quiet or json_output) as on_progress:
        if questions.is_questions(file):
            result = multiple_choice.evaluate(model, file, options, on_progress)
        else:
            result = perplexity.evaluate(model, file, options, on_progress)
    typer.echo(as_json(result) if json_output else result.table())
