"""`spqt convert`: its flags."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from spqt_cli.cli import flags
from spqt_cli.cli.flags import FitData, FitSeed, Json, OwnText, Preset, Revision, TrainSteps, values
from spqt_cli.cli.output import as_json, progress
from spqt_cli.errors import UnsupportedError, UsageError
from spqt_cli.system.terminal import harmless


def convert(
    model: Annotated[
        str | None,
        typer.Argument(help="HF folder, hub id (org/name) or .gguf file.", autocompletion=flags.models),
    ] = None,
    hf_path: Annotated[
        str | None, typer.Option("--hf-path", "--model", help="The same, as an option.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--mlx-path", "-o", help="Folder to write; it must not exist.", readable=False),
    ] = None,
    q_bits: Annotated[int | None, typer.Option(help="Bits per weight: 2, 3, 4, 5, 6 or 8.")] = None,
    q_group_size: Annotated[int | None, typer.Option(help="Outputs per scale: 32, 64 or 128.")] = None,
    quantize: Annotated[
        bool, typer.Option("--quantize", "-q", help="mlx-lm's; convert always quantizes.")
    ] = False,
    q_mode: Annotated[
        str, typer.Option(help="mlx-lm's; Zigzag has affine alone.", autocompletion=values("affine"))
    ] = "affine",
    quant_predicate: Annotated[
        str | None, typer.Option(help="mlx-lm's mixed recipes; refused: --preset mixed is ours.")
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", "-d", help="mlx-lm's; refused: the result would not be Zigzag.")
    ] = False,
    head_bits: Annotated[
        int | None, typer.Option(help="Bits of embedding and head; default: 5, or --q-bits where more.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float16, bfloat16 or float32 for what stays unquantized.",
            autocompletion=values("float16", "bfloat16", "float32"),
        ),
    ] = None,
    preset: Preset = "default",
    profile: Annotated[
        float | None,
        typer.Option(
            metavar="SPARSITY", help="Row-grouped where this device's profile says so at that sparsity."
        ),
    ] = None,
    revision: Revision = None,
    allow_requantize: Annotated[
        bool, typer.Option(help="Accept a source that is quantized already.")
    ] = False,
    zigzag_experts: Annotated[
        bool,
        typer.Option(help="Zigzag also of experts in 4-bit floats (mxfp4, nvfp4): rounds them once more."),
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Accept a model that asks for its own code; mlx-lm's is used instead.")
    ] = False,
    upload_repo: Annotated[str | None, typer.Option(help="Hub repository to upload the result to.")] = None,
    fit: Annotated[
        str,
        typer.Option(
            help="none: each weight is rounded by itself; gptq: for the inputs that a layer will see, on "
            "text that the model writes; full: scales and norms are trained as well. It says how "
            "long it takes.",
            autocompletion=values("none", "gptq", "full"),
        ),
    ] = "none",
    own_text: OwnText = None,
    train_steps: TrainSteps = None,
    data: FitData = None,
    seed: FitSeed = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")
    ] = False,
    force: Annotated[bool, typer.Option(help="Go on although memory looks short.")] = False,
    quiet: flags.QuietAlone = False,
    json_output: Json = False,
) -> None:
    """Re-quantize a checkpoint into the Zigzag layout.

    Flags are mlx_lm.convert's where it has them, -q too: no progress is --quiet here.
    """
    _refuse(quantize, q_mode, quant_predicate, dequantize)
    from spqt_cli.cli import presets
    from spqt_cli.convert import convert as converter

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
        zigzag_experts=zigzag_experts,
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
    if fit == "none" and (own_text, train_steps, data) != (None, None, None):
        raise UsageError(
            "--own-text, --train-steps and --data say how to fit, and nothing is to be fitted",
            "add --fit gptq or --fit full",
        )
    result: Any
    with progress(quiet or json_output) as on_progress:
        if fit == "none" or dry_run:
            result = converter.convert(source, target, options, on_progress)
        else:
            from spqt_cli.fit import fit as fitter
            from spqt_cli.fit.options import FitOptions

            wanted = FitOptions(method=fit, own=own_text, steps=train_steps, data=data, seed=seed)
            result = fitter.convert_fitted(source, target, options, wanted, on_progress)
    if upload_repo and not dry_run:
        card.upload(target, upload_repo)
    if json_output:
        typer.echo(as_json(result))
    else:
        typer.echo(harmless(result.summary()))
        if not dry_run and not quiet:
            typer.echo(f"next: spqt calibrate {shlex.quote(str(target))}", err=True)


def _refuse(quantize: bool, q_mode: str, quant_predicate: str | None, dequantize: bool) -> None:
    """Flags of mlx_lm.convert that ask for something else than Zigzag."""
    if quantize and dequantize:
        raise UsageError("--quantize and --dequantize exclude one another", "leave both out")
    if dequantize:
        raise UnsupportedError("--dequantize: Zigzag weights are quantized", "use mlx_lm.convert -d")
    if q_mode != "affine":
        raise UnsupportedError(f"--q-mode {q_mode}: Zigzag has affine alone", "leave --q-mode out")
    if quant_predicate is not None:
        raise UnsupportedError(
            f"--quant-predicate {quant_predicate}: mlx-lm's recipes are for its own layout",
            "--preset mixed gives q, k and v more bits; a .toml preset names others",
        )
