"""Commands that run models: generate, compare, eval, doctor, and the hand-over to mlx-lm."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from spqt_cli.cli import flags
from spqt_cli.cli.flags import ModelArgument, ModelOption
from spqt_cli.cli.make_commands import Json, Quiet, Revision, Trust, as_json, progress
from spqt_cli.errors import SpqtError, UsageError

Sparsity = Annotated[
    float | None,
    typer.Option(help="Skip this share instead of the calibrated one; 0: exact zeros alone, without loss."),
]


def generate(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt; '-' reads stdin.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", "-f", help="A UTF-8 file.", readable=False)
    ] = None,
    system_prompt: Annotated[str | None, typer.Option(help="System turn of the chat template.")] = None,
    prefill_response: Annotated[str | None, typer.Option(help="Beginning of the answer.")] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", help="Most tokens to write; -1: no limit.")
    ] = 256,
    dense: Annotated[
        bool, typer.Option("--dense", help="Skip nothing, exact zeros included, for comparison.")
    ] = False,
    sparsity: Sparsity = None,
    temp: Annotated[float, typer.Option(help="Temperature; 0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Least probability, relative to the likeliest.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest; 0: from all.")] = 0,
    min_tokens_to_keep: Annotated[int, typer.Option(help="Least tokens that min-p keeps.")] = 1,
    xtc_probability: Annotated[float, typer.Option(help="Chance of XTC sampling at each token.")] = 0.0,
    xtc_threshold: Annotated[float, typer.Option(help="Probability above which XTC drops tokens.")] = 0.0,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: discourage repeats.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampler.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; repeatable.")] = None,
    extra_eos_token: Annotated[list[str] | None, typer.Option(help="End at this token; repeatable.")] = None,
    ignore_chat_template: Annotated[
        bool, typer.Option("--ignore-chat-template", help="Send the raw prompt.")
    ] = False,
    chat_template_config: Annotated[
        str | None, typer.Option(help="JSON object for the chat template.")
    ] = None,
    max_kv_size: Annotated[int | None, typer.Option(help="Longest key-value cache, in tokens.")] = None,
    prefill_step_size: Annotated[int, typer.Option(help="Prompt tokens run at a time.")] = 2048,
    kv_bits: Annotated[
        int | None, typer.Option(help="Quantize the key-value cache to this many bits.")
    ] = None,
    kv_group_size: Annotated[int, typer.Option(help="Group size of the quantized cache.")] = 64,
    quantized_kv_start: Annotated[int, typer.Option(help="First token of the quantized cache.")] = 5000,
    adapter_path: Annotated[str | None, typer.Option(help="LoRA adapters (not on Zigzag layers).")] = None,
    draft_model: Annotated[str | None, typer.Option(help="A smaller model for speculative decoding.")] = None,
    num_draft_tokens: Annotated[int, typer.Option(help="Tokens that the draft model proposes.")] = 3,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Write text from a prompt, decoding sparsely."""
    model = flags.needed(model, model_option, 'spqt generate MODEL --prompt "Hello"')
    text = _prompt_text(prompt, prompt_file)
    _check_max_tokens(max_tokens)
    _check_sparsity(sparsity)
    if dense and sparsity is not None:
        raise UsageError("--dense and --sparsity exclude one another", "give one of them")
    from spqt_cli.calibrate import result
    from spqt_cli.decode import generate as generator
    from spqt_cli.decode import session as models

    loaded = models.load(
        model,
        sparsity=sparsity,
        dense=dense,
        revision=revision,
        trust_remote_code=trust_remote_code,
        adapter_path=adapter_path,
    )
    request = generator.Prompt(
        text, system_prompt, prefill_response, ignore_chat_template, chat_template_config
    )
    sampling = generator.Sampling(
        temp=temp,
        top_p=top_p,
        min_p=min_p,
        top_k=top_k,
        min_tokens_to_keep=min_tokens_to_keep,
        xtc_probability=xtc_probability,
        xtc_threshold=xtc_threshold,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    cache = {"max_kv_size": max_kv_size, "prefill_step_size": prefill_step_size, "kv_bits": kv_bits}
    cache.update({"kv_group_size": kv_group_size, "quantized_kv_start": quantized_kv_start})
    draft = models.load_draft(draft_model, loaded, dense=dense) if draft_model else None
    if draft is not None:
        cache = {**cache, "num_draft_tokens": num_draft_tokens}
        if loaded.sparsity:
            several = (
                "proposed tokens are checked several at a time, which skips channels but reads all weights"
            )
            loaded.note = "; ".join(filter(None, [loaded.note, several]))
    options = generator.Options(max_tokens, stop or (), extra_eos_token or (), cache, draft)
    tokens = generator.encode(loaded, request)
    if loaded.note and not quiet:
        typer.echo(f"note: {loaded.note}", err=True)
    if not quiet and (said := result.warning_of(loaded.folder.calibration, loaded.sparsity)):
        typer.echo(said, err=True)
    _print_stream(generator.stream(loaded, tokens, sampling, options), quiet, json_output)


def _prompt_text(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise UsageError("--prompt and --prompt-file exclude one another", "give one of them")
    if prompt is not None and prompt != "-":
        text = prompt.replace("\\n", "\n").replace("\\t", "\t")  # as mlx_lm.generate reads it
    elif prompt_file is None and prompt is None and sys.stdin.isatty():
        raise UsageError("there is no prompt", 'give one: --prompt "Hello", or pipe text in')
    else:
        from spqt_cli.system import files

        where = str(prompt_file) if prompt_file else "stdin"
        try:
            data = files.read_bounded(prompt_file) if prompt_file else files.drain(sys.stdin.buffer, where)
            text = data.decode("utf-8")
            if prompt_file is None:  # `echo` ends its line, which is no part of what was meant
                text = text.removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise SpqtError(
                f"{where} is not UTF-8: byte {error.start}", "convert the text to UTF-8"
            ) from None
        except OSError as error:
            raise SpqtError(f"{where} can't be read: {error.strerror}", "give a UTF-8 text file") from None
    if not text.strip():
        raise UsageError("the prompt is empty", 'give one: --prompt "Hello", or pipe text in')
    return text


def _check_max_tokens(max_tokens: int) -> None:
    if max_tokens == 0 or max_tokens < -1:
        raise UsageError(
            f"--max-tokens {max_tokens}: nothing to do", "give a positive number, or -1 for no limit"
        )


def _check_sparsity(sparsity: float | None) -> None:
    from spqt_cli.format import thresholds

    thresholds.check_sparsity(sparsity)


def _print_stream(pieces: Any, quiet: bool, json_output: bool) -> None:
    """Text to stdout as it comes, statistics to stderr; or both as one JSON object."""
    import dataclasses

    from spqt_cli.system.terminal import harmless

    shown = harmless if sys.stdout.isatty() else str
    texts, statistics = [], None
    for piece in pieces:
        if not isinstance(piece, str):
            statistics = piece
        elif json_output:
            texts.append(piece)
        else:
            sys.stdout.write(shown(piece))
            sys.stdout.flush()
    assert statistics is not None
    if json_output:
        typer.echo(json.dumps({"text": "".join(texts), **dataclasses.asdict(statistics)}))
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    if not quiet:
        typer.echo(statistics.line(), err=True)
        typer.echo(f"  {statistics.backend}: {statistics.backend_reason}", err=True)


def compare(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The prompt; '-' reads stdin.")],
    model: ModelArgument = None,
    model_option: ModelOption = None,
    sparsity: Annotated[
        str, typer.Option(help="Shares to compare, comma-separated; 0 is dense.")
    ] = "0,0.25,0.4",
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-m", help="Tokens of each text.")] = 96,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Answer one prompt at several sparsities: text, speed and cost side by side."""
    model = flags.needed(model, model_option, 'spqt compare MODEL --prompt "Hello"')
    text = _prompt_text(prompt, None)
    _check_max_tokens(max_tokens)
    try:
        shares = [float(part) for part in sparsity.split(",")]
    except ValueError:
        raise UsageError(f"--sparsity {sparsity!r} is no list of numbers", "for example 0,0.25,0.4") from None
    for share in shares:
        _check_sparsity(share)
    from spqt_cli.decode import generate as generator
    from spqt_cli.evaluate import compare as comparer

    def announce(what: str) -> None:
        if not (quiet or json_output):
            typer.echo(f"{what} ...", err=True)

    rows = comparer.compare(model, generator.Prompt(text), shares, max_tokens, announce)
    typer.echo(as_json([comparer.as_dict(row) for row in rows]) if json_output else comparer.report(rows))


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
        str | None, typer.Option(help="A share, a list, or a sweep such as 0.1:0.7:0.1.")
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
    from spqt_cli.evaluate import evaluate as evaluator
    from spqt_cli.evaluate import multiple_choice, questions

    options = evaluator.EvaluateOptions(
        windows=windows,
        sparsity=sparsity,
        baseline=baseline,
        rows=rows,
        source_head=source_head,
        limit=limit,
    )
    with progress(quiet or json_output) as on_progress:
        if questions.is_questions(file):
            answers = multiple_choice.evaluate(model, file, options, on_progress)
            shown = as_json(answers) if json_output else multiple_choice.report(answers)
        elif limit is not None:
            raise UsageError("--limit counts the questions of a .jsonl file", "of a text use --windows")
        else:
            quality = evaluator.evaluate(model, file, options, on_progress)
            shown = as_json(quality) if json_output else evaluator.report(quality)
    typer.echo(shown)


def doctor(
    selftest: Annotated[
        bool, typer.Option("--selftest", help="Run every kernel against its definition.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Say what this machine has and which backend spqt uses; check its kernels."""
    from spqt_cli.cli import doctor as doctors

    report = doctors.examine(selftest)
    typer.echo(as_json(report) if json_output else report.text())
    if not report.healthy:
        raise typer.Exit(6)


def mlx_lm(context: typer.Context) -> None:
    """Run an mlx-lm command (chat, server, benchmark, ...) on converted models."""
    from spqt_cli.cli import passthrough

    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    passthrough.run(context.args)
