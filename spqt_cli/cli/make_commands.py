"""Commands that make and look at models: convert, calibrate, inspect, verify."""

import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from spqt_cli.errors import UsageError
from spqt_cli.system.terminal import harmless

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no statistics.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Preset = Annotated[
    str, typer.Option(help="default, mixed, small, fast, exact, a family (smollm2) or a .toml file.")
]
Trust = Annotated[bool, typer.Option(help="Run code that comes with the model.")]


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[float, float, str], None]]:
    """A callback (done, total, what) drawn as a bar on a terminal's stderr, as plain lines elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if quiet:
        yield lambda done, total, what: None
    elif not console.is_terminal:
        yield _plain_lines()
    else:
        columns = (
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(TextColumn("{task.description}"), *columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total, what: bar.update(
                task, completed=done, total=total, description=what[-40:]
            )


def _plain_lines() -> Callable[[float, float, str], None]:
    from time import monotonic

    last = monotonic()

    def show(done: float, total: float, what: str) -> None:
        nonlocal last
        if monotonic() - last >= 2:  # a line every two seconds: alive, and not a flood in a log
            last = monotonic()
            typer.echo(f"{done / total:4.0%}  {what}" if total else what, err=True)

    return show


def as_json(value: Any) -> str:
    """A result (dataclass, Path and all) as one line of JSON; NaN and infinity, which JSON lacks, as null."""
    plain = (
        dataclasses.asdict(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type)
        else value
    )
    return json.dumps(_finite(plain), default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def convert(
    model: Annotated[str | None, typer.Argument(help="HF folder, hub id (org/name) or .gguf file.")] = None,
    hf_path: Annotated[
        str | None, typer.Option("--hf-path", "--model", help="The same, as an option.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--mlx-path", "-o", help="Folder to write; it must not exist.", readable=False),
    ] = None,
    q_bits: Annotated[int | None, typer.Option(help="Bits per weight: 2, 3, 4, 5, 6 or 8.")] = None,
    q_group_size: Annotated[int | None, typer.Option(help="Outputs per scale: 32, 64 or 128.")] = None,
    head_bits: Annotated[
        int | None, typer.Option(help="Bits of embedding and head; default: 5, or --q-bits where more.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float16, bfloat16 or float32 for what stays unquantized.")
    ] = None,
    preset: Preset = "default",
    profile: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Row-grouped where this device's profile says so, SHARE skipped."),
    ] = None,
    revision: Revision = None,
    allow_requantize: Annotated[
        bool, typer.Option(help="Accept a source that is quantized already.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Accept a model that asks for its own code; mlx-lm's is used instead.")
    ] = False,
    upload_repo: Annotated[str | None, typer.Option(help="Hub repository to upload the result to.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")
    ] = False,
    force: Annotated[bool, typer.Option(help="Go on although memory looks short.")] = False,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Re-quantize a checkpoint into the Zigzag layout."""
    from spqt_cli.convert import convert as converter
    from spqt_cli.format import presets

    if (model is None) == (hf_path is None):
        raise UsageError("convert takes one source", "spqt convert FOLDER_OR_HUB_ID_OR_GGUF")
    source = model if model is not None else hf_path
    assert source is not None
    wishes = presets.merged(
        presets.load_preset(preset), bits=q_bits, group_size=q_group_size, head_bits=head_bits
    )
    options = converter.ConvertOptions(
        bits=wishes.bits or 4,
        group_size=wishes.group_size or 64,
        dtype=dtype,
        revision=revision,
        allow_requantize=allow_requantize,
        trust_remote_code=trust_remote_code,
        force=force,
        dry_run=dry_run,
        skip=wishes.skip,
        head_bits=wishes.head_bits,
        projections=wishes.projections,
        profile=profile,
        sparsity=wishes.sparsity,
    )
    target = output or converter.default_output(source, options)
    if upload_repo:
        from spqt_cli.convert import card

        card.check_upload(upload_repo)
    with progress(quiet or json_output) as on_progress:
        result = converter.convert(source, target, options, on_progress)
    if upload_repo and not dry_run:
        card.upload(target, upload_repo)
    if json_output:
        typer.echo(as_json(result))
    else:
        typer.echo(harmless(result.summary()))
        if not dry_run and not quiet:
            typer.echo(f"next: spqt calibrate {shlex.quote(str(target))}", err=True)


def calibrate(
    model: Annotated[Path, typer.Argument(help="A converted folder.", readable=False)],
    sparsity: Annotated[
        float | None,
        typer.Option(help="Share of channels to skip, 0 to 0.95; 0: exact zeros alone, without loss."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="UTF-8 text; default: the text that ships with spqt.", readable=False)
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of text to run.")] = None,
    method: Annotated[str | None, typer.Option(help="auto, fast, paper or uniform.")] = None,
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
    remove: Annotated[bool, typer.Option("--remove", help="Take the thresholds out: dense again.")] = False,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Choose the thresholds below which channels are skipped."""
    from spqt_cli.calibrate import calibrate as calibrator
    from spqt_cli.format import presets

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
    limited = any(limit is not None for limit in limits.values())  # stands above the preset's share
    share = sparsity if limited else wishes.sparsity
    chosen: dict[str, Any] = {"sparsity": share, "tokens": wishes.tokens, "method": wishes.method}
    options = dataclasses.replace(
        options, **{key: value for key, value in chosen.items() if value is not None}
    )
    with progress(quiet or json_output) as on_progress:
        result = calibrator.calibrate(model, options, on_progress)
    if json_output:
        typer.echo(as_json(result))
    elif not quiet:
        calibrator.print_table(result, sys.stdout)
    if result.note and (json_output or quiet):
        typer.echo(f"note: {result.note}", err=True)
    if result.warning:
        typer.echo(result.warning, err=True)


def inspect(
    model: Annotated[str, typer.Argument(help="A converted folder or hub id.")],
    revision: Revision = None,
    json_output: Json = False,
) -> None:
    """Show what a converted folder holds, from its headers alone."""
    from spqt_cli.cli import describe

    summary = describe.describe(model, revision)
    typer.echo(as_json(summary) if json_output else harmless(summary.text()))


def verify(
    model: Annotated[Path, typer.Argument(help="A converted folder.", readable=False)],
    json_output: Json = False,
) -> None:
    """Read every byte of a converted folder and hold it against its recorded hashes."""
    from spqt_cli.format.folder import Folder

    shards = Folder(model).verify()
    typer.echo(as_json({"shards": shards}) if json_output else f"{model}: {len(shards)} shard(s) intact")
