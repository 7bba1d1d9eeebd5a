"""Turns of a user and a model, on one key-value cache that keeps what both still agree on.

It knows prompts and the cache; the loop is `generate.stream`, and nothing is printed here.
"""

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from spqt_cli.decode import context, generate, session
from spqt_cli.decode.options import Loading, Options, Prompt, Sampling, check
from spqt_cli.errors import SpqtError, UsageError
from spqt_cli.format import thresholds

WHOLE = ("top_k", "min_tokens_to_keep", "seed", "max_tokens")  # settings that are whole numbers


class Conversation:
    """What was said so far, and the model that goes on with it.

    loaded: the model; `skip` replaces it. messages: of user and assistant, as chat templates take them.
    """

    def __init__(
        self, loaded: session.Loaded, loading: Loading, template: Prompt, sampling: Sampling, options: Options
    ) -> None:
        """loading: how `loaded` was opened. template: system prompt and settings; its text is not used."""
        self.loaded = loaded
        self.messages: list[dict[str, str]] = []
        self._loading: Loading = loading.copy()
        self._template, self._sampling, self._options = template, sampling, options
        self._first = self.settings
        self._cache: list[Any] | None = None
        self._fed: list[int] = []  # tokens that the cache is known to hold; what else it holds comes after

    def reply(self, text: str) -> Generator[Any]:
        """Pieces of the answer as they come (str), then its Statistics; both messages are kept then.

        An answer that is broken off (the iterator is closed) is kept as far as it went, if it had begun.
        Raises SpqtError where the conversation no longer fits into the model's context.
        """
        prompt = replace(self._template, text=text, history=tuple(self.messages))
        try:
            tokens = generate.encode(self.loaded, prompt)
        except context.ContextError as error:
            raise SpqtError(f"the conversation is too long: {error.cause}", "/clear forgets it") from None
        cache, kept = self._cache_for(tokens)
        answer: list[str] = []
        written: list[int] = []
        is_whole = False
        options = replace(self._options, on_token=written.append, prompt_cache=cache)
        try:
            for piece in generate.stream(self.loaded, tokens[kept:], self._sampling, options):
                is_whole = not isinstance(piece, str)
                answer += [] if is_whole else [piece]
                yield piece
        finally:
            self._fed = (tokens + written)[: context.held(cache)]
            if answer or is_whole:
                self.messages += [
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": "".join(answer)},
                ]

    @property
    def tokens(self) -> int:
        """The tokens in the key-value cache."""
        return context.held(self._cache)

    def clear(self) -> None:
        """Forget what was said."""
        self.messages, self._cache, self._fed = [], None, []

    @property
    def settings(self) -> dict[str, float | None]:
        """How answers are drawn: mlx-lm's names, and max_tokens."""
        return {**vars(self._sampling), "max_tokens": self._options.max_tokens}

    def set(self, name: str, value: float | None) -> None:
        """Draw the next answers with another one of `settings`; None: as at the beginning.

        Raises UsageError for a value out of range.
        """
        wanted: Any = self._first[name] if value is None else value
        if value is not None and name in WHOLE:
            if not value.is_integer():
                raise UsageError(f"{name} {value}: no whole number", f"/set {name} 40")
            wanted = int(value)
        if name == "max_tokens":
            self._options = replace(self._options, max_tokens=wanted)
            return
        sampling = replace(self._sampling, **{name: wanted})
        check(sampling, self._options.cache, self.loaded.config)
        self._sampling = sampling

    def skip(self, sparsity: float | None) -> None:
        """Go on at another sparsity, 0 to 0.95; None runs dense. The model is loaded anew.

        A device's profile repacks layers for one sparsity, and there is no way back. Raises UsageError for a
        sparsity out of range, SpqtError where the model has no thresholds; the conversation goes on then.
        Where loading itself fails, `loaded` is gone.
        """
        folder = self.loaded.folder
        thresholds.check_sparsity(sparsity)
        folder.thresholds(sparsity or 0.0)
        del self.loaded  # both would be in memory
        self._loading["sparsity"], self._loading["dense"] = sparsity, sparsity is None
        self.loaded = session.load(folder, **self._loading)

    def _cache_for(self, tokens: Sequence[int]) -> tuple[list[Any], int]:
        """(a cache of the first tokens, how many those are); one that can't be cut back is made anew."""
        from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

        kept = _agreeing(self._fed, tokens[:-1])  # the last one is fed in any case
        surplus = self.tokens - kept
        if self._cache is None or (surplus and not can_trim_prompt_cache(self._cache)):
            self._cache, kept = make_prompt_cache(self.loaded.model, self._options.cache.max_kv_size), 0
        elif surplus:
            trim_prompt_cache(self._cache, surplus)
        return self._cache, kept


def _agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens from the beginning on are the same."""
    differing = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))
