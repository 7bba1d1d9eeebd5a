"""`spqt generate`: its flags.

A new flag is a parameter here and a field of the same name in decode/options.py, which holds its range.
decode/generate.py acts on it.
"""

from pathlib import Path
from typing import Annotated

import typer

from spqt_cli.cli import flags
from spqt_cli.cli.flags import Adapter, Json, ModelArgument, ModelOption, Quiet, Revision, Trust
from spqt_cli.cli.output import show
from spqt_cli.cli.prompt import prompt_text
from spqt_cli.errors import UnsupportedError, UsageError
from spqt_cli.system import launched, peers


def generate(
    model: ModelArgument = None,
    words: flags.Words = None,
    model_option: ModelOption = None,
    prompt: flags.PromptOption = None,
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
    xtc_threshold: flags.XtcThreshold = 0.1,
    repetition_penalty: flags.RepetitionPenalty = None,
    presence_penalty: flags.PresencePenalty = None,
    frequency_penalty: flags.FrequencyPenalty = None,
    seed: flags.Seed = None,
    stop: flags.Stop = None,
    extra_eos_token: Annotated[list[str] | None, typer.Option(help="End at this token; repeatable.")] = None,
    ignore_chat_template: Annotated[
        bool, typer.Option("--ignore-chat-template", help="Send the raw prompt.")
    ] = False,
    chat_template_config: flags.ChatTemplateConfig = None,
    use_default_chat_template: Annotated[
        bool, typer.Option("--use-default-chat-template", help="Use the chat template, as by default.")
    ] = False,
    max_kv_size: flags.MaxKvSize = None,
    prefill_step_size: flags.PrefillStepSize = 2048,
    kv_bits: Annotated[
        int | None, typer.Option(help="Quantize the key-value cache to this many bits.")
    ] = None,
    kv_group_size: Annotated[int, typer.Option(help="Group size of the quantized cache.")] = 64,
    quantized_kv_start: Annotated[int, typer.Option(help="First token of the quantized cache.")] = 5000,
    adapter_path: Adapter = None,
    draft_model: Annotated[str | None, typer.Option(help="A smaller model for speculative decoding.")] = None,
    num_draft_tokens: Annotated[int, typer.Option(help="Tokens that the draft model proposes.")] = 3,
    prompt_cache_file: Annotated[
        Path | None,
        typer.Option(
            help="Go on after a prompt whose key-value cache mlx-lm's cache_prompt put into this file.",
            readable=False,
        ),
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="mlx-lm's; refused, since only text models are converted.")
    ] = None,
    quantize_activations: Annotated[
        bool,
        typer.Option(
            "--quantize-activations", "-qa", help="mlx-lm's; refused, since no Zigzag kernel does it."
        ),
    ] = False,
    verbose: Annotated[
        str | None,
        typer.Option(metavar="BOOL", help="mlx-lm's: false or f is --quiet; true explains the bytes read."),
    ] = None,
    pipeline: flags.Pipeline = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Write text from a prompt, decoding sparsely."""
    given = locals()  # by the names that the options have in decode/options.py
    flagged = prompt if prompt is not None else prompt_file
    model, words = flags.model_and_prompt(model, words, model_option, flagged)
    path = flags.needed(model, model_option, 'spqt generate MODEL "Hello"')
    text = prompt_text(prompt, prompt_file, words)
    if dense and sparsity is not None:
        raise UsageError("--dense and --sparsity exclude one another", "give one of them")
    if use_default_chat_template and ignore_chat_template:
        raise UsageError("--use- and --ignore-chat-template exclude one another", "give one of them")
    if prompt_cache_file is not None and launched.size() > 1:
        raise UsageError("--prompt-cache-file has the cache of one process", "leave it out, or start one")
    if prompt_cache_file is not None and draft_model is not None:
        raise UsageError("--prompt-cache-file has no cache of a draft model", "leave one of them out")
    _refuse(image, quantize_activations)
    quiet = quiet or (verbose or "").lower() in ("false", "f")
    from spqt_cli.decode import cached_prompt, context, session
    from spqt_cli.decode import generate as generator
    from spqt_cli.decode.options import Cache, Loading, Options, Prompt, Sampling, picked

    sampling, request = picked(Sampling, given), picked(Prompt, {**given, "text": text})
    options = picked(Options, {**given, "cache": picked(Cache, given)})
    loaded = session.load(path, **picked(Loading, given))
    if prompt_cache_file is None:
        tokens = generator.encode(loaded, request)
    else:
        options.prompt_cache = cached_prompt.read(prompt_cache_file, path, loaded, options.cache)
        tokens = generator.encode_rest(loaded, request, context.held(options.prompt_cache))
    if not quiet:
        for line in filter(None, [loaded.note and f"note: {loaded.note}", loaded.warning]):
            typer.echo(line, err=True)
    statistics = show(generator.stream(loaded, tokens, sampling, options), json_output=json_output)
    peers.stop()
    if not (quiet or json_output):
        typer.echo(statistics.line(), err=True)
        typer.echo(f"  {statistics.backend}: {statistics.backend_reason}", err=True)
        more = session.more_than_stored(loaded, statistics.dense_weight_bytes_per_token)
        if verbose is not None and more:
            typer.echo(f"  {more}", err=True)


def _refuse(image: list[str] | None, quantize_activations: bool) -> None:
    """Flags of mlx_lm.generate that a converted model can't follow."""
    if image:
        raise UnsupportedError(
            "--image: spqt converts text models alone", "use mlx_lm.generate with the source"
        )
    if quantize_activations:
        raise UnsupportedError(
            "--quantize-activations: no Zigzag kernel does it", "use mlx_lm.generate with an nvfp4 model"
        )
