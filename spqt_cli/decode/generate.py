"""Text from a prompt: mlx-lm's own loop, with counts of what was really skipped.

It knows prompts, sampling and stop strings; the loop and the cache are mlx-lm's.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from spqt_cli.backends import select
from spqt_cli.decode import active_counts, context, fused, parallel, session, text_borders
from spqt_cli.decode.options import Options, Prompt, Sampling, check
from spqt_cli.errors import BackendError, SpqtError, UsageError
from spqt_cli.system import files, sandbox

CHECK_EVERY = 32  # tokens between looks at the log-probabilities: a look waits for the device


@dataclass
class Statistics:
    """What one generation did. Rates in tokens per second, sizes in bytes, sparsity 0 to 1.

    Of what was decoded: prompts run dense. sparsity: fraction of Zigzag weights skipped, the mean over tokens
    fed. weight_bytes_per_token: read for each token written, by the draft model too; steps that verify drafts
    read what any of their rows needs. dense_weight_bytes_per_token: what the same steps would read dense.
    draft_sparsity: the draft model's; None without one. fused_blocks: how its transformer blocks ran.
    processes: how many ran it together, and parallel how, "tensor" or "pipeline", "" for one; memory then is
    the largest of them, bytes are those of one, the mean.
    """

    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory_bytes: float
    backend: str
    backend_reason: str
    sparsity: float
    weight_bytes_per_token: float
    dense_weight_bytes_per_token: float
    finish_reason: str | None
    note: str = ""
    draft_sparsity: float | None = None
    fused_blocks: fused.Report = field(default_factory=fused.Report)
    processes: int = 1
    parallel: str = ""

    def line(self) -> str:
        """The statistics as one line of text."""
        draft = "" if self.draft_sparsity is None else f" ({self.draft_sparsity:.1%} of the draft model's)"
        several = f" | {self.parallel} parallel, {self.processes} processes: figures of one"
        several *= self.processes > 1
        return (
            f"prompt {self.prompt_tokens} tokens, {self.prompt_tps:.1f} tok/s | "
            f"generation {self.generation_tokens} tokens, {self.generation_tps:.1f} tok/s | "
            f"peak memory {self.peak_memory_bytes / 1e9:.2f} GB | backend {self.backend} | "
            f"skipped {self.sparsity:.1%} of the Zigzag weights{draft} | "
            f"{self.weight_bytes_per_token / 1e6:.1f} MB of weights a token "
            f"(dense {self.dense_weight_bytes_per_token / 1e6:.1f}) | {self.fused_blocks.line()}{several}"
        )


def encode(loaded: session.Loaded, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, the chat template applied as mlx-lm applies it.

    Raises UsageError for an empty prompt, SpqtError when template or context do not take it.
    """
    if not prompt.text.strip():
        raise UsageError("the prompt is empty", 'give one: --prompt "Hello", or pipe text in')
    if not files.is_utf8("".join(filter(None, (prompt.text, prompt.system_prompt, prompt.prefill_response)))):
        raise SpqtError("the prompt is not UTF-8", "convert it to UTF-8")
    tokenizer = loaded.tokenizer
    if prompt.ignore_chat_template or not tokenizer.has_chat_template:
        tokens = text_borders.encode(tokenizer, prompt.text)
    elif _spells_control(tokenizer, prompt):
        tokens = _encode_literally(tokenizer, prompt)
    else:
        tokens = tokenizer.encode(_templated(tokenizer, prompt), add_special_tokens=False)
    if not tokens:
        raise SpqtError("template and tokenizer leave nothing of the prompt", "try --ignore-chat-template")
    if (limit := context.tokens(loaded.config)) is not None:
        context.room(limit, len(tokens))
    return session.known(loaded, tokens)


def encode_rest(loaded: session.Loaded, prompt: Prompt, held: int) -> list[int]:
    """Token ids of a prompt without what the template puts before it, which a cache of `held` tokens has.

    As `mlx_lm.generate --prompt-cache-file` takes it. Raises as `encode`.
    """
    encode(loaded, prompt)  # refuses what can't be a prompt
    tokenizer = loaded.tokenizer
    if prompt.ignore_chat_template or not tokenizer.has_chat_template:
        tokens = text_borders.encode(tokenizer, prompt.text)
    else:
        _, _, after = _templated(tokenizer, replace(prompt, text=_mark(0))).partition(_mark(0))
        if _spells_control(tokenizer, prompt):
            tokens = tokenizer.encode(prompt.text, add_special_tokens=False, split_special_tokens=True)
            tokens += tokenizer.encode(after, add_special_tokens=False)
        else:
            tokens = tokenizer.encode(prompt.text + after, add_special_tokens=False)
    if (limit := context.tokens(loaded.config)) is not None:
        context.room(limit, held + len(tokens))
    return session.known(loaded, tokens)


def _encode_literally(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids when a user's text spells a control token: the text stays text and forges no message.

    Template and texts are tokenized apart, which other prompts are not: mlx-lm tokenizes them together.
    """
    texts: list[str] = []
    history = []
    for message in prompt.history:
        typed = message["role"] == "user"
        history.append({**message, "content": _mark(len(texts))} if typed else message)
        texts += [message["content"]] if typed else []
    texts.append(prompt.text)
    rest = _templated(tokenizer, replace(prompt, text=_mark(len(texts) - 1), history=history))
    tokens: list[int] = []
    for number, text in enumerate(texts):
        before, found, after = rest.partition(_mark(number))
        if found:  # a template may leave messages out
            tokens += tokenizer.encode(before, add_special_tokens=False)
            tokens += tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
            rest = after
    return tokens + list(tokenizer.encode(rest, add_special_tokens=False))


def _mark(number: int) -> str:
    """Stands for a user's text. Invisible separators are in no template, and stripped by none."""
    return f"\u2063prompt {number}\u2063"


def _spells_control(tokenizer: Any, prompt: Prompt) -> bool:
    """Whether a user's text, this or an earlier one, spells a token that was added to the vocabulary."""
    texts = [prompt.text, *(one["content"] for one in prompt.history if one["role"] == "user")]
    return any(token in text for token in tokenizer.get_added_vocab() for text in texts)


def _templated(tokenizer: Any, prompt: Prompt) -> str:
    messages: list[Mapping[str, str | None]] = (
        [{"role": "system", "content": prompt.system_prompt}] if prompt.system_prompt is not None else []
    )
    messages += [dict(one) for one in prompt.history]
    messages.append({"role": "user", "content": prompt.text})
    prefilled = prompt.prefill_response is not None
    if prefilled:
        messages.append({"role": "assistant", "content": prompt.prefill_response})
    try:
        config = json.loads(prompt.chat_template_config) if prompt.chat_template_config else {}
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise UsageError(f"--chat-template-config is not a JSON object: {error}", '{"name": true}') from None
    try:
        with sandbox.bounded("the chat template"):
            return tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                continue_final_message=prefilled,
                add_generation_prompt=not prefilled,
                **config,
            )
    except SpqtError:
        raise
    except Exception as error:  # a template is the model's code: it may raise anything
        raise SpqtError(f"the chat template failed: {error}", "try --ignore-chat-template") from error


def stream(loaded: session.Loaded, tokens: list[int], sampling: Sampling, options: Options) -> Iterator[Any]:
    """Pieces of text as they come (str), then the Statistics of the run, last."""
    import mlx_lm

    check(sampling, options.cache, loaded.config)
    if sampling.seed is not None:
        mx.random.seed(sampling.seed)
    for name in options.extra_eos_token or ():
        try:
            loaded.tokenizer.add_eos_token(name)
        except ValueError:
            raise UsageError(
                f"--extra-eos-token {name}: the model has no such token", "see tokenizer.json"
            ) from None
    arguments = _loop_arguments(loaded, sampling, options)
    mx.reset_peak_memory()
    gate, response, stopped = StopStrings(options.stop or ()), None, False
    answer = text_borders.Answer(loaded.tokenizer, tokens)
    with active_counts.counting(select.backend().count_every) as counter:
        for response in mlx_lm.stream_generate(loaded.model, loaded.tokenizer, tokens, **arguments):
            if response.generation_tokens % CHECK_EVERY == 1 or response.finish_reason:
                _check_finite(response)
            text, stopped = gate.push(_text(answer, response, options))
            if text:
                yield text
            if stopped:
                break
    if not stopped and (rest := gate.flush()):
        yield rest
    yield _statistics(loaded, response, counter, "stop string" if stopped else None)


def _text(answer: text_borders.Answer, response: Any, options: Options) -> str:
    """The text that a step adds; an end-of-sequence token has none."""
    text = ""
    if response.finish_reason != "stop":
        options.on_token(response.token)
        text = answer.push(response.token)
    return text + answer.flush() if response.finish_reason else text


def _loop_arguments(loaded: session.Loaded, sampling: Sampling, options: Options) -> dict[str, Any]:
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    tokenizer = loaded.tokenizer
    sampler = make_sampler(
        sampling.temp,
        sampling.top_p,
        sampling.min_p,
        sampling.min_tokens_to_keep,
        top_k=sampling.top_k,
        xtc_probability=sampling.xtc_probability,
        xtc_threshold=sampling.xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )
    if loaded.processes is not None:
        sampler = _agreeing(sampler, loaded.processes)
    arguments = {"max_tokens": options.max_tokens, "sampler": sampler, **vars(options.cache)}
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    penalties = {name: value for name in names if (value := getattr(sampling, name)) is not None}
    if penalties:
        arguments["logits_processors"] = make_logits_processors(**penalties)
    if options.prompt_cache is not None:
        arguments["prompt_cache"] = options.prompt_cache
    if loaded.draft is not None:
        arguments |= {"draft_model": loaded.draft.model, "num_draft_tokens": options.num_draft_tokens}
    return arguments


def _agreeing(sampler: Any, processes: parallel.Processes) -> Any:
    """A sampler that gives all processes the first one's token."""
    return lambda logprobs: processes.agreed(sampler(logprobs))


def _check_finite(response: Any) -> None:
    if not math.isfinite(response.logprobs[response.token].item()):
        raise BackendError(
            "the model's output is not finite (NaN or infinity)", "try --dense, or convert again"
        )


def _statistics(
    loaded: session.Loaded,
    response: Any,
    counter: active_counts.Counter,
    reason: str | None,
) -> Statistics:
    shares = counter.shares()
    read, dense, skipped = session.touched_bytes(loaded, shares)
    draft, draft_skipped = loaded.draft, None
    if draft is not None:
        more, more_dense, draft_skipped = session.touched_bytes(draft, shares)
        of_draft, own = (counter.steps(one.model) / response.generation_tokens for one in (draft, loaded))
        read, dense = own * read + of_draft * more, own * dense + of_draft * more_dense
    backend, memory, together = select.backend(), response.peak_memory * 1e9, loaded.processes
    if together is not None:
        read, dense, skipped = _of_all(loaded, together, (read, dense, skipped))
        (memory,) = together.all([memory], mx.distributed.all_max)
    return Statistics(
        prompt_tokens=response.prompt_tokens,
        prompt_tps=response.prompt_tps,
        generation_tokens=response.generation_tokens,
        generation_tps=response.generation_tps,
        peak_memory_bytes=memory,
        backend=backend.name,
        backend_reason=backend.reason,
        sparsity=skipped,
        weight_bytes_per_token=read,
        dense_weight_bytes_per_token=dense,
        finish_reason=reason or response.finish_reason,
        note=loaded.note,
        draft_sparsity=draft_skipped,
        fused_blocks=fused.report(loaded.model),
        processes=1 if together is None else together.size,
        parallel="" if together is None else together.how,
    )


def _of_all(
    loaded: session.Loaded, processes: parallel.Processes, own: tuple[float, float, float]
) -> tuple[float, float, float]:
    """(bytes read a token by one process, dense, fraction of all Zigzag weights skipped), of own figures."""
    zigzag = sum(session.weight_bytes(loaded.model, loaded.config)[1].values())
    read, dense, skipped, of = processes.all([own[0], own[1], own[2] * zigzag, zigzag])
    return read / processes.size, dense / processes.size, skipped / max(of, 1)


class StopStrings:
    """Holds back text that may be the beginning of a stop string, across pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = [stop for stop in stops if stop]
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """(text that may be shown, whether a stop string was met)."""
        if not self.stops:
            return piece, False
        self._held += piece
        found = [at for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if found:
            text, self._held = self._held[: min(found)], ""
            return text, True
        keep = max(
            (n for stop in self.stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])),
            default=0,
        )
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text, False

    def flush(self) -> str:
        """What is still held when generation ends."""
        text, self._held = self._held, ""
        return text
