"""`spqt calibrate`: its flags."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from spqt_cli.cli import calibrating, flags, upload
from spqt_cli.cli.flags import Json, Preset, Quiet
from spqt_cli.cli.output import as_json, progress, say_written
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
    upload_repo: flags.UploadRepo = None,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Choose the thresholds below which channels are skipped."""
    from spqt_cli.calibrate import calibrate as calibrator
    from spqt_cli.cli import presets

    if plot is not None:
        picture.check(plot, json_output)
    if remove:
        calibrator.remove(model)
        typer.echo(
            as_json({"removed": True}) if json_output else f"{model}: thresholds removed, decoding is dense"
        )
        return
    upload.check(upload_repo)
    wishes = presets.merged(presets.load_preset(preset), sparsity=sparsity, tokens=tokens, method=method)
    limits: dict[str, Any] = {
        "max_kl": max_kl,
        "max_ppl_increase": max_ppl_increase,
        "min_tokens_per_second": min_tokens_per_second,
    }
    if any(limit is not None for limit in limits.values()):  # overrides the preset's sparsity
        wishes = dataclasses.replace(wishes, sparsity=sparsity)
    options = calibrating.options(wishes, data=data, seed=seed, restart=restart, stream=stream, **limits)
    silent = quiet or json_output
    with progress(silent) as on_progress:
        result = calibrator.calibrate(model, options, on_progress, calibrating.estimate(silent))
    if json_output:
        typer.echo(as_json(result))
    calibrating.report(result, model, quiet=quiet, json_output=json_output)
    if plot is not None:
        from spqt_cli.cli import pictures

        picture.save(pictures.of_calibration(result), plot)
        say_written(plot, silent)
    upload.put(model, upload_repo, silent)
