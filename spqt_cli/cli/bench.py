"""`spqt bench`: its flags."""

import math
from pathlib import Path
from typing import Annotated

import typer

from spqt_cli.cli import flags
from spqt_cli.cli.flags import Json, ModelArgument, ModelOption, Quiet
from spqt_cli.cli.output import progress, say_written
from spqt_cli.errors import ResourceError, UsageError
from spqt_cli.system import peers, picture


def bench(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    shape: Annotated[
        str | None, typer.Option(help="Random weights in the sizes of a known model, such as llama-3-8b.")
    ] = None,
    kernel: Annotated[
        bool, typer.Option("--kernel", help="Measure each projection alone, not tokens/s.")
    ] = False,
    sparsity: Annotated[
        str | None, typer.Option(help="Sparsities, comma-separated [0.25,0.5; --kernel: also 0.75].")
    ] = None,
    depth: Annotated[str, typer.Option(help="Context depths, comma-separated.")] = "0",
    prompt_tokens: Annotated[
        str | None,
        typer.Option("--prompt-tokens", "-p", help="Prompt lengths, comma-separated; 0: none [512; CPU 16]."),
    ] = None,
    generation_tokens: Annotated[
        int | None, typer.Option("--generation-tokens", "-g", help="Tokens decoded [64; CPU 8].")
    ] = None,
    repetitions: Annotated[
        int | None, typer.Option("--repetitions", "-r", help="Runs of every variant, at least 2 [5; CPU 3].")
    ] = None,
    blocks: Annotated[
        int | None, typer.Option(help="Build only so many transformer blocks of the shape.")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Bits of a shape's weights [4].")] = None,
    group_size: Annotated[int | None, typer.Option(help="Group size of a shape's weights [64].")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of a shape: float16, bfloat16 or float32 [its own].")
    ] = None,
    delay: Annotated[float, typer.Option(help="Seconds of rest between repetitions.")] = 0.0,
    output_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="md, csv, json or jsonl.",
            autocompletion=flags.values("md", "csv", "json", "jsonl"),
        ),
    ] = "md",
    write: Annotated[
        bool, typer.Option("--write", help="With --kernel: store the best way per layer for this device.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write JSON here.", readable=False)
    ] = None,
    plot: flags.Plot = None,
    pipeline: flags.Pipeline = False,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Measure stock mlx-lm and sparse decoding side by side on this machine."""
    model = flags.optional(model, model_option, "spqt bench MODEL, or --shape llama-3-8b")
    if write and not kernel:
        raise UsageError("--write goes with --kernel", "spqt bench --kernel --write MODEL")
    if model is not None and (bits, group_size, dtype) != (None, None, None):
        raise UsageError("--bits, --group-size and --dtype go with --shape", "a converted model has its own")
    if not 0 <= delay < math.inf:
        raise UsageError(f"--delay {delay} is not a number of seconds", "0 or more")
    if plot is not None:
        if kernel:
            raise UsageError("--plot draws tokens per second", "leave --kernel out")
        if generation_tokens == 0:
            raise UsageError("--plot draws decoding", "leave -g 0 out")
        picture.check(plot, json_output)
    from spqt_cli.bench import bench as benches
    from spqt_cli.bench import results
    from spqt_cli.decode import parallel

    form = "json" if json_output else output_format
    results.check_format(form)
    if output is not None:
        _write(output, "", mode="a")  # before the work, and what is there stays
    options = benches.Options(
        model=model,
        shape=shape,
        sparsities=_numbers("--sparsity", sparsity or ("0.25,0.5,0.75" if kernel else "0.25,0.5")),
        depths=_counts("--depth", depth),
        prompt_tokens=None if prompt_tokens is None else _lengths(prompt_tokens),
        generation_tokens=generation_tokens,
        repetitions=repetitions,
        blocks=blocks,
        bits=4 if bits is None else bits,
        group_size=64 if group_size is None else group_size,
        dtype=dtype,
        delay_seconds=delay,
        processes=parallel.join(pipeline=pipeline),
    )
    with progress(quiet or json_output) as on_progress:
        report = (benches.run_kernels if kernel else benches.run)(options, on_progress)
    peers.stop()
    typer.echo(results.render(report, form))
    if plot is not None:
        from spqt_cli.cli import pictures

        picture.save(pictures.of_bench(report), plot)
        say_written(plot, quiet or json_output)
    if output is not None:
        _write(output, results.render(report, "json") + "\n")
        say_written(output, quiet or json_output)
    if write:
        if (busy := benches.unsteadiness(report)) > benches.UNSTEADY:
            raise ResourceError(
                f"times spread by {busy:.0%}, so no profile is written",
                "measure again when the machine is idle",
            )
        typer.echo(f"profile written: {benches.write_profile(report)}", err=True)


def _lengths(text: str) -> list[int]:
    return [] if text == "0" else _counts("--prompt-tokens", text)


def _counts(flag: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{flag} {text!r} is not a list of whole numbers", "for example 512,4096") from None


def _numbers(flag: str, text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError
        return numbers
    except ValueError:
        raise UsageError(f"{flag} {text!r} is not a list of numbers", "for example 0.25,0.5") from None


def _write(path: Path, text: str, mode: str = "w") -> None:
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ResourceError(f"{path} can't be written: {error.strerror}", "choose another --output") from None
