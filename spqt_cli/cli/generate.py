"""`spqt generate`: its flags.

A new flag is a parameter here and a field of the same name in decode/options.py, which holds its range.
decode/generate.py acts on it.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from spqt_cli.cli import flags
from spqt_cli.cli.flags import Json, ModelArgument, ModelOption, Quiet, Revision, Trust
from spqt_cli.cli.prompt import prompt_text
from spqt_cli.errors import UsageError


def generate(
    model: ModelArgument = None,
    words: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The prompt.", show_default=False)
    ] = None,
    model_option: ModelOption = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt; '-' reads stdin.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", "-f", help="A UTF-8 file.", readable=False)
    ] = None,
    system_prompt: Annotated[str | None, typer.Option(help="System message of the chat template.")] = None,
    prefill_response: Annotated[str | None, typer.Option(help="Beginning of the answer.")] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", help="Most tokens to write; -1: no limit.")
    ] = 256,
    dense: Annotated[
        bool, typer.Option("--dense", help="Skip nothing, exact zeros included, for comparison.")
    ] = False,
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="Sparsity instead of the calibrated one, 0 to 0.95; 0 skips only exact zeros, without loss."
        ),
    ] = None,
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
    given = locals()  # by the names that the options have in decode/options.py
    if words is None and (prompt, prompt_file) == (None, None) and model_option not in (None, model):
        model, words = None, model  # beside --model a lone argument is the prompt
    path = flags.needed(model, model_option, 'spqt generate MODEL "Hello"')
    text = prompt_text(prompt, prompt_file, words)
    if dense and sparsity is not None:
        raise UsageError("--dense and --sparsity exclude one another", "give one of them")
    from spqt_cli.decode import generate as generator
    from spqt_cli.decode import session
    from spqt_cli.decode.options import Cache, Loading, Options, Prompt, Sampling, picked

    sampling, request = picked(Sampling, given), picked(Prompt, {**given, "text": text})
    options = picked(Options, {**given, "cache": picked(Cache, given)})
    loaded = session.load(path, **picked(Loading, given))
    tokens = generator.encode(loaded, request)
    if not quiet:
        for line in filter(None, [loaded.note and f"note: {loaded.note}", loaded.warning]):
            typer.echo(line, err=True)
    _print_stream(generator.stream(loaded, tokens, sampling, options), quiet, json_output)


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
