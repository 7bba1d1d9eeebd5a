"""`spqt convert`: its flags."""

from pathlib import Path
from typing import Annotated

import typer

from spqt_cli.cli import converting, flags, upload
from spqt_cli.cli.flags import FitData, FitSeed, Json, OwnText, Preset, Revision, TrainSteps, values
from spqt_cli.errors import UnsupportedError, UsageError


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
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Choose thresholds too, as spqt calibrate does.")
    ] = False,
    sparsity: Annotated[
        float | None, typer.Option(help="Calibrate for this sparsity, 0 to 0.95 [by the model's size].")
    ] = None,
    upload_repo: flags.UploadRepo = None,
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
    """Re-quantize a checkpoint into the Zigzag layout; with --calibrate choose thresholds as well.

    Flags are mlx_lm.convert's where it has them, -q too: no progress is --quiet here.
    """
    _refuse(quantize, q_mode, quant_predicate, dequantize)
    if (model is None) == (hf_path is None):
        raise UsageError("convert takes one source", "spqt convert FOLDER_OR_HUB_ID_OR_GGUF")
    if fit == "none" and (own_text, train_steps, data) != (None, None, None):
        raise UsageError(
            "--own-text, --train-steps and --data say how to fit, and nothing is to be fitted",
            "add --fit gptq or --fit full",
        )
    from spqt_cli.cli import presets
    from spqt_cli.convert.convert import ConvertOptions
    from spqt_cli.fit.options import FitOptions

    wishes = presets.merged(
        presets.load_preset(preset),
        bits=q_bits,
        group_size=q_group_size,
        head_bits=head_bits,
        sparsity=sparsity,
    )
    options = ConvertOptions(
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
        sparsity_from="as asked for" if sparsity is not None else "the preset's",
    )
    wanted = FitOptions(method=fit, own=own_text, steps=train_steps, data=data, seed=seed)
    source = model if model is not None else hf_path
    assert source is not None
    made = converting.Job(source, output, options, None if fit == "none" else wanted)
    upload.check(upload_repo)
    calibrates = calibrate or sparsity is not None
    if dry_run:
        converting.rehearsed(made, wishes if calibrates else None, json_output=json_output)
    elif calibrates:
        converting.and_calibrate(made, wishes, quiet=quiet, json_output=json_output)
    else:
        converting.alone(made, quiet=quiet, json_output=json_output)
    if not dry_run:
        upload.put(made.target, upload_repo, quiet or json_output)


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
