"""`spqt generate`: its flags.

A new flag is a parameter here and a field of the same name in decode/options.py, which holds its range.
decode/generate.py acts on it.
"""

from pathlib import Path
from typing import Annotated

import typer

from spqt_cli.cli import flags
from spqt_cli.cli.flags import Json, ModelArgument, ModelOption, Quiet, Revision, Trust
from spqt_cli.cli.output import show
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
    system_prompt: flags.SystemPrompt = None,
    prefill_response: Annotated[str | None, typer.Option(help="Beginning of the answer.")] = None,
    max_tokens: flags.MaxTokens = 256,
    dense: flags.Dense = False,
    sparsity: flags.Sparsity = None,
    temp: flags.Temp = 0.0,
    top_p: flags.TopP = 1.0,
    min_p: flags.MinP = 0.0,
    top_k: flags.TopK = 0,
    min_tokens_to_keep: flags.MinTokensToKeep = 1,
    xtc_probability: flags.XtcProbability = 0.0,
    xtc_threshold: flags.XtcThreshold = 0.0,
    repetition_penalty: flags.RepetitionPenalty = None,
    seed: flags.Seed = None,
    stop: flags.Stop = None,
    extra_eos_token: Annotated[list[str] | None, typer.Option(help="End at this token; repeatable.")] = None,
    ignore_chat_template: Annotated[
        bool, typer.Option("--ignore-chat-template", help="Send the raw prompt.")
    ] = False,
    chat_template_config: flags.ChatTemplateConfig = None,
    max_kv_size: flags.MaxKvSize = None,
    prefill_step_size: flags.PrefillStepSize = 2048,
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
    statistics = show(generator.stream(loaded, tokens, sampling, options), json_output=json_output)
    if not (quiet or json_output):
        typer.echo(statistics.line(), err=True)
        typer.echo(f"  {statistics.backend}: {statistics.backend_reason}", err=True)
