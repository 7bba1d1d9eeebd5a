"""`spqt compare`: its flags."""

from pathlib import Path
from typing import Annotated

import typer

from spqt_cli.cli import flags
from spqt_cli.cli.flags import Json, ModelArgument, ModelOption, Quiet
from spqt_cli.cli.output import as_json, progress, say_written
from spqt_cli.cli.prompt import prompt_text
from spqt_cli.errors import UsageError
from spqt_cli.system import picture


def compare(
    model: ModelArgument = None,
    words: flags.Words = None,
    model_option: ModelOption = None,
    prompt: flags.PromptOption = None,
    sparsity: Annotated[
        str, typer.Option(help="Sparsities to compare, comma-separated; 0 is dense.")
    ] = "0,0.25,0.4",
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-m", help="Tokens of each text.")] = 96,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="The unquantized source: adds stock MLX's rounding of it, and KL to it instead of to dense.",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text for the KL; default: the text that ships with spqt.", readable=False),
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows of that text.")] = 4,
    rounds: Annotated[
        int, typer.Option(help="Rounds of timing, by turns, after one that warms up; at least 3.")
    ] = 3,
    plot: flags.Plot = None,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Answer one prompt at several sparsities: text, speed and cost side by side."""
    model, words = flags.model_and_prompt(model, words, model_option, prompt)
    model = flags.needed(model, model_option, 'spqt compare MODEL "Hello"')
    asked = prompt_text(prompt, None, words)
    try:
        sparsities = [float(part) for part in sparsity.split(",")]
    except ValueError:
        raise UsageError(
            f"--sparsity {sparsity!r} is not a list of numbers", "for example 0,0.25,0.4"
        ) from None
    if plot is not None:
        picture.check(plot, json_output)
    from spqt_cli.decode.options import Prompt
    from spqt_cli.evaluate import compare as comparer
    from spqt_cli.evaluate import compare_report
    from spqt_cli.format import thresholds

    for one in sparsities:
        thresholds.check_sparsity(one)
    effort, silent = comparer.Effort(max_tokens, rounds), quiet or json_output
    expected = comparer.expectation(model, sparsities)
    if not silent:
        typer.echo(expected, err=True)
    reference = comparer.Reference(baseline, text, windows)
    with progress(silent) as on_progress:
        rows = comparer.compare(model, Prompt(asked), sparsities, effort, on_progress, reference)
    typer.echo(as_json(rows) if json_output else compare_report.report(rows))
    if plot is not None:
        from spqt_cli.cli import pictures

        picture.save(pictures.of_comparison(model, rows), plot)
        say_written(plot, silent)
