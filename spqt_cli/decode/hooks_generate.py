"""mlx-lm's loops say which tokens are prompt and which were generated, so that phase.py can be asked.

The last token of a prompt, which mlx-lm feeds alone, is prompt like the others. A request keeps to this from
its first token to its last: alone, in a batch that others join and leave, and where drafts are verified.
"""

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from spqt_cli.backends import select
from spqt_cli.decode import active_counts, context, foreign, phase
from spqt_cli.decode.layers import ZigzagLayer

MAX_TOKENS = 256  # of mlx-lm's loops, where none are asked for
_stock: dict[str, Callable[..., Any]] = {}  # by name: what mlx_lm.generate had of its own


def install(loops: Any) -> None:
    """Put our loops in the place of mlx-lm's, wherever a module has their names; again changes nothing.

    loops: the module mlx_lm.generate.
    """
    if _stock:
        return
    for ours in (generate_step, speculative_generate_step, stream_generate):
        stock = _stock[ours.__name__] = getattr(loops, ours.__name__)
        foreign.replace_everywhere(loops, ours.__name__, functools.update_wrapper(ours, stock))
    prompts, generation = loops.PromptProcessingBatch, loops.GenerationBatch
    foreign.replace(prompts, "prompt", _one_by_one(prompts.prompt, loops._merge_caches))
    foreign.replace(generation, "__init__", _within(phase.prompting, generation.__init__))
    foreign.replace(generation, "next", _decoding(generation.next))
    foreign.replace(loops.BatchGenerator, "insert_segments", _inserting(loops.BatchGenerator.insert_segments))


def _one_by_one(method: Callable[..., Any], merge: Callable[..., Any]) -> Callable[..., Any]:
    """mlx-lm's `prompt`; on the CPU each request by itself, whose cache is then the one that it has alone."""

    @functools.wraps(method)
    def prompt(self: Any, tokens: list[list[int]]) -> Any:
        alone = select.backend().native_float32 and len(tokens) == len(self.uids)
        with phase.prompting():
            if not alone or not any(tokens):
                return method(self, tokens)
            caches = [[_one_of(cache, at) for cache in self.prompt_cache] for at in range(len(tokens))]
            for cache, held, fed in zip(caches, self.tokens, tokens, strict=True):
                held.extend(fed)
                for at in range(0, len(fed), self.prefill_step_size):
                    self.model(mx.array([fed[at : at + self.prefill_step_size]]), cache=cache)
                    mx.eval([one.state for one in cache])
                    mx.clear_cache()
            self.prompt_cache = merge(caches)
        return None

    return prompt


def _one_of(cache: Any, at: int) -> Any:
    """The cache of one request of a batch. mlx-lm's `extract` takes no cache that nothing has joined."""
    from mlx_lm.models.cache import (
        ArraysCache,
        BatchKVCache,
        BatchRotatingKVCache,
        CacheList,
        KVCache,
        RotatingKVCache,
    )

    if isinstance(cache, CacheList):
        return CacheList(*(_one_of(one, at) for one in cache.caches))
    if type(cache) is BatchKVCache and cache.empty():
        return KVCache()
    if type(cache) is BatchRotatingKVCache and cache.empty():
        return RotatingKVCache(cache.max_size)
    if type(cache) is ArraysCache and cache.empty():
        return ArraysCache(len(cache.cache))
    return cache.extract(at)


def _decoding(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any) -> Any:
        with phase.decoding(), active_counts.rows_of(self.uids):
            return method(self)

    return call


def _within(block: Callable[[], Any], method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with block():
            return method(*args, **kwargs)

    return call


def _inserting(method: Callable[..., Any]) -> Callable[..., Any]:
    """mlx-lm's insert_segments, each request ended at what the model is kept to."""

    @functools.wraps(method)
    def insert(
        self: Any, segments: Any, max_tokens: Any = None, caches: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        if (limit := context.of(self.model)) is not None:
            wishes = max_tokens or [self.max_tokens] * len(segments)
            fed = [sum(map(len, parts)) for parts in segments]
            if caches:
                fed = [count + context.held(cache) for count, cache in zip(fed, caches, strict=True)]
            max_tokens = [context.room(limit, *each) for each in zip(fed, wishes, strict=True)]
        return method(self, segments, max_tokens, caches, *args, **kwargs)

    return insert


def _keep(model: Any, prompt_tokens: int, options: dict[str, Any]) -> None:
    """Shorten `max_tokens` of a loop's options to what a model is kept to; SpqtError if nothing is left."""
    if (limit := context.of(model)) is not None:
        fed = context.held(options.get("prompt_cache")) + prompt_tokens
        options["max_tokens"] = context.room(limit, fed, options.get("max_tokens", MAX_TOKENS))


def check_perplexity(perplexity: Any) -> None:
    """Let mlx-lm's perplexity refuse windows that are longer than a model is kept to.

    perplexity: the module mlx_lm.perplexity.
    """
    stock: Any = perplexity.eval_ppl
    if stock.__module__ == __name__:
        return

    def eval_ppl(model: Any, data: mx.array, *args: Any, **kwargs: Any) -> Any:
        context.window(context.of(model), data.shape[1], 0)
        return stock(model, data, *args, **kwargs)

    foreign.replace(perplexity, "eval_ppl", eval_ppl)


def refuse_long(server: Any) -> None:
    """Let mlx-lm's server answer with an error where a prompt is longer than its model is kept to.

    server: the module mlx_lm.server. Its batches would refuse it too, but that ends the generating thread.
    """
    generator: Any = server.ResponseGenerator
    stock = generator._tokenize
    if stock.__module__ == __name__:
        return

    def _tokenize(self: Any, *args: Any) -> Any:
        found = stock(self, *args)
        if (limit := context.of(self.model_provider.model)) is not None:
            context.room(limit, len(found[0]))
        return found

    foreign.replace(generator, "_tokenize", _tokenize)


def stream_generate(model: Any, tokenizer: Any, prompt: Any, *args: Any, **kwargs: Any) -> Any:
    if context.of(model) is not None:
        if args:
            kwargs["max_tokens"], args = args[0], args[1:]
        if isinstance(prompt, str):  # as mlx-lm does it
            plain = tokenizer.bos_token is None or not prompt.startswith(tokenizer.bos_token)
            prompt = tokenizer.encode(prompt, add_special_tokens=plain)
        embeddings = kwargs.get("input_embeddings")
        _keep(model, len(prompt if embeddings is None else embeddings), kwargs)
        args = (kwargs.pop("max_tokens"), *args)
    return _stock["stream_generate"](model, tokenizer, prompt, *args, **kwargs)


def generate_step(prompt: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    embeddings = kwargs.get("input_embeddings")
    count = len(prompt if embeddings is None else embeddings)
    _keep(model, count, kwargs)
    return _stock["generate_step"](prompt, told(model, count), *args, **kwargs)


def speculative_generate_step(prompt: Any, model: Any, draft_model: Any, *args: Any, **kwargs: Any) -> Any:
    count = len(prompt)
    _keep(model, count, kwargs)
    models = told(model, count), told(draft_model, count)
    return _stock["speculative_generate_step"](prompt, *models, *args, **kwargs)


def told(model: Any, prompt_tokens: int) -> Any:
    """`model` for one request: of the tokens it is fed, the first `prompt_tokens` are prompt."""
    kind: Any = type(model)
    return _kind(kind)(model, prompt_tokens)


class Told:
    """A model as one request's loop calls it; everything but the call is the model's own."""

    def __init__(self, model: Any, prompt_tokens: int) -> None:
        self._model, self._prompt_tokens = model, prompt_tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def _call(self, tokens: mx.array, *args: Any, **kwargs: Any) -> Any:
        embeddings = kwargs.get("input_embeddings")
        rows = (tokens if embeddings is None else embeddings).shape[1]
        of_prompt = min(self._prompt_tokens, rows)
        self._prompt_tokens -= of_prompt
        if 0 < of_prompt < rows and skips(self._model):
            # The first verification of drafts begins with the prompt's last token, which goes ahead.
            with phase.prompting():
                first = self._model(tokens[:, :of_prompt], *args, **kwargs)
            return mx.concatenate([first, self._decode(tokens[:, of_prompt:], *args, **kwargs)], axis=1)
        if of_prompt:
            with phase.prompting():
                return self._model(tokens, *args, **kwargs)
        return self._decode(tokens, *args, **kwargs)

    def _decode(self, *args: Any, **kwargs: Any) -> Any:
        if counter := active_counts.current():
            counter.stepped(self._model)
        with phase.decoding():
            return self._model(*args, **kwargs)


@functools.cache
def _kind(kind: Any) -> type[Told]:
    """A subclass of Told whose call has the signature of that class's: mlx-lm looks for an argument there."""

    @functools.wraps(kind.__call__)
    def ask(self: Told, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    return type(kind.__name__, (Told,), {"__call__": ask})


def skips(model: Any) -> bool:
    """Whether any layer of a model skips channels when it decodes."""
    return any(isinstance(one, ZigzagLayer) and one.threshold is not None for one in model.modules())
