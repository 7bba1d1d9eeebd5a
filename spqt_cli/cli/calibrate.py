"""`spqt calibrate`: its flags."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from spqt_cli.cli import flags
from spqt_cli.cli.flags import Json, Preset, Quiet
from spqt_cli.cli.output import as_json, progress
from spqt_cli.system import picture


def calibrate(
    model: Annotated[Path, typer.Argument(help="A converted folder.", readable=False)],
    sparsity: Annotated[
        float | None,
        typer.Option(help="Sparsity to calibrate for, 0 to 0.95; 0 skips only exact zeros, without loss."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="UTF-8 text; default: the text that ships with spqt.", readable=False)
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of text to run.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="auto, fast, paper or uniform.",
            autocompletion=flags.values("auto", "fast", "paper", "uniform"),
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which windows of the text are used.")] = 0,
    max_kl: Annotated[float | None, typer.Option(help="Instead of a sparsity: KL to dense, in nats.")] = None,
    max_ppl_increase: Annotated[
        float | None, typer.Option(help="Instead of a sparsity: rise of perplexity, in percent.")
    ] = None,
    min_tokens_per_second: Annotated[
        float | None, typer.Option(help="Instead of a sparsity: the least that decodes so fast here.")
    ] = None,
    restart: Annotated[bool, typer.Option(help="Drop the progress of an unfinished run.")] = False,
    stream: Annotated[
        bool | None,
        typer.Option(help="Load one block of weights at a time [when they don't fit in memory]."),
    ] = None,
    preset: Preset = "default",
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove the thresholds: decoding is dense again.")
    ] = False,
    plot: flags.Plot = None,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Choose the thresholds below which channels are skipped."""
    from spqt_cli.calibrate import calibrate as calibrator
    from spqt_cli.cli import presets
    from spqt_cli.decode import quality_warning

    if plot is not None:
        picture.check(plot)
    if remove:
        calibrator.remove(model)
        typer.echo(
            as_json({"removed": True}) if json_output else f"{model}: thresholds removed, decoding is dense"
        )
        return
    wishes = presets.merged(presets.load_preset(preset), sparsity=sparsity, tokens=tokens, method=method)
    limits: dict[str, Any] = {
        "max_kl": max_kl,
        "max_ppl_increase": max_ppl_increase,
        "min_tokens_per_second": min_tokens_per_second,
    }
    options = calibrator.CalibrateOptions(data=data, seed=seed, restart=restart, stream=stream, **limits)
    limited = any(limit is not None for limit in limits.values())  # overrides the preset's sparsity
    wanted = sparsity if limited else wishes.sparsity
    chosen: dict[str, Any] = {"sparsity": wanted, "tokens": wishes.tokens, "method": wishes.method}
    options = dataclasses.replace(
        options, **{key: value for key, value in chosen.items() if value is not None}
    )
    with progress(quiet or json_output) as on_progress:
        result = calibrator.calibrate(model, options, on_progress)
    if plot is not None:
        from spqt_cli.cli import pictures

        picture.save(pictures.of_calibration(result), plot)
    if json_output:
        typer.echo(as_json(result))
    elif not quiet:
        calibrator.print_table(result, sys.stdout)
    if result.note and (json_output or quiet):
        typer.echo(f"note: {result.note}", err=True)
    if result.warning:
        typer.echo(result.warning, err=True)
    if not (quiet or json_output):
        kl = result.tried[0].kl
        typer.echo(f"KL to dense {kl:.3f} on held-out text: {quality_warning.judged(kl)}", err=True)
        typer.echo(f'next: spqt compare {shlex.quote(str(model))} --prompt "Hello"', err=True)
