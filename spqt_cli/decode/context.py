"""How many tokens a model may be fed: a config's own limit, and the one up to which mlx-lm's class is right.

The second (`settle`) stands in the `spqt` section of a converted config.json; `exact` tells it to each model
that is loaded from there. Whoever feeds a model asks here; it knows neither layers nor loops.
"""

from collections.abc import Sequence
from typing import Any

from spqt_cli.errors import SpqtError
from spqt_cli.format import config_json


class ContextError(SpqtError):
    """A prompt leaves no room in the model's context."""


def kept_to(config: dict[str, Any]) -> int | None:
    """Tokens up to which mlx-lm's class computes a converted model rightly; None for all."""
    section = config.get("spqt")
    return config_json.size(section, "context") if isinstance(section, dict) else None


def tokens(config: dict[str, Any]) -> int | None:
    """The model's context length in tokens: the config's own, or the shorter one that it is kept to.

    None where config.json does not say.
    """
    limits = (config_json.size(config, "max_position_embeddings"), kept_to(config))
    return min((each for each in limits if each is not None), default=None)


def tell(model: Any, config: dict[str, Any]) -> None:
    """Let a model say by `of` what its config is kept to. Raises SpqtError for a damaged entry."""
    if config["spqt"].get("context") is not None and kept_to(config) is None:
        raise SpqtError("context in config.json's spqt section is no number", "convert the model again")
    model.spqt_context = kept_to(config)


def of(model: Any) -> int | None:
    """The tokens that a loaded model is kept to; None for all."""
    limit: int | None = getattr(model, "spqt_context", None)
    return limit


def held(cache: Sequence[Any] | None) -> int:
    """The tokens that a prompt cache of one sequence has seen."""
    offsets = [getattr(each, "offset", 0) for each in cache or ()]
    nested = [held(each.caches) for each in cache or () if hasattr(each, "caches")]
    return max([offset for offset in offsets if isinstance(offset, int)] + nested, default=0)


def room(limit: int, prompt_tokens: int, wished: int = -1) -> int:
    """The tokens that may be generated after a prompt: what is wished (negative: all), or what is left.

    Raises ContextError for a prompt that leaves no room for one.
    """
    if prompt_tokens >= limit:
        raise ContextError(
            f"the prompt has {prompt_tokens} tokens, the model's context {limit}", "shorten it"
        )
    left = limit - prompt_tokens
    return left if wished < 0 else min(wished, left)


def window(limit: int | None, wished: int | None, default: int) -> tuple[int, str]:
    """(tokens of a text's windows, a line for people where the default had to be shortened).

    Raises SpqtError where longer ones are wished than the model's context.
    """
    if limit is None or (wished or default) <= limit:
        return wished or default, ""
    if wished is not None:
        raise SpqtError(
            f"windows of {wished} tokens, the model's context is {limit}", f"use windows of up to {limit}"
        )
    return limit, f"windows of {limit} tokens instead of {default}: the model's context"
