"""`spqt mlx-lm evaluate`: lm-eval's tasks on a converted model, answered as it decodes.

mlx-lm's wrapper scores context and ending in one pass, which runs dense as a prompt does, so it measures
quantization but not sparsity. For a model with Zigzag layers its loglikelihood is replaced by that of
multiple_choice.py, which masks the rows that generate would decode. Tasks that generate text are left as is.
"""

import importlib.util
from collections import defaultdict
from typing import Any

import numpy as np

from spqt_cli.decode import context, foreign, text_borders
from spqt_cli.decode.layers import zigzag_layers
from spqt_cli.errors import SpqtError, UnsupportedError
from spqt_cli.evaluate import multiple_choice
from spqt_cli.measure import probes, scoring


def prepare() -> None:
    """Patch mlx-lm's wrapper. Raises UnsupportedError without lm-eval."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UnsupportedError("lm-eval is not installed", "pip install 'spqt[lm-eval]'")
    from mlx_lm import evaluate

    wrapper: Any = evaluate.MLXLM  # a class whose methods are replaced
    stock = wrapper.loglikelihood, wrapper.loglikelihood_rolling

    def loglikelihood(self: Any, requests: list[Any]) -> list[tuple[float, bool]]:
        return _loglikelihood(self, requests) if zigzag_layers(self._model) else stock[0](self, requests)

    def rolling(self: Any, requests: list[Any]) -> list[float]:
        if any(layer.threshold is not None for layer in zigzag_layers(self._model).values()):
            raise UnsupportedError(
                "a task scores whole texts, which have no prompt to run dense",
                "spqt eval TEXT measures perplexity as decoding has it; SPQT_SPARSITY=0 runs the task dense",
            )
        longest = max((len(text) for text in self._tokenize([one.args[0] for one in requests])), default=0)
        context.window(context.of(self._model), longest, 0)
        result: list[float] = stock[1](self, requests)
        return result

    foreign.replace(wrapper, "loglikelihood", loglikelihood)
    foreign.replace(wrapper, "loglikelihood_rolling", rolling)


def _loglikelihood(self: Any, requests: list[Any]) -> list[tuple[float, bool]]:
    """Of each request (context, continuation): its log-probability, and whether it is the greedy one."""
    from tqdm import tqdm

    grouped: dict[str, list[int]] = defaultdict(list)
    for i, request in enumerate(requests):
        grouped[request.args[0]].append(i)
    layers = zigzag_layers(self._model)
    values = {
        path: np.array(one.threshold).item() for path, one in layers.items() if one.threshold is not None
    }
    found: list[tuple[float, bool]] = [(-np.inf, False)] * len(requests)
    with probes.probing(self._model) as harness:
        for text, places in tqdm(grouped.items()):
            question = _encode(self, text, [requests[i].args[1] for i in places])
            cache = multiple_choice.after_context(self._model, question)
            masking = probes.Masking(values)
            predicted = multiple_choice.predictions(self._model, cache, question, harness, masking)
            for i, ending, log_p in zip(places, question.endings, predicted, strict=True):
                greedy = bool((scoring.first_choice(log_p) == ending).all())
                found[i] = (multiple_choice.summed(log_p, ending), greedy)
    return found


def _encode(self: Any, before: str, endings: list[str]) -> multiple_choice.Encoded:
    """In tokens as mlx-lm's wrapper does it, with one BOS; a context that is too long loses its beginning."""
    from mlx_lm.evaluate import DEFAULT_MAX_TOKENS

    def encoded(text: str) -> list[int]:
        if self.use_chat_template:
            return list(self.tokenizer.encode(text, add_special_tokens=False))
        return text_borders.encode(self.tokenizer, text)

    prompt = encoded(before)
    whole = [encoded(before + ending) for ending in endings]
    cut = [tokens[len(prompt) :] or tokens[-1:] for tokens in whole]
    prompt = prompt or [self.tokenizer.eos_token_id]  # lm-eval's stand-in for no context
    limit, longest = context.of(self._model), max(map(len, cut))
    room = (
        min(self._max_tokens or DEFAULT_MAX_TOKENS, DEFAULT_MAX_TOKENS if limit is None else limit) - longest
    )
    if limit is not None and room < 1:
        raise SpqtError(
            f"an ending of {longest} tokens, the model's context is {limit}", "leave the task out"
        )
    characters = np.array([len(ending) for ending in endings], np.float64)
    return multiple_choice.Encoded(prompt[-max(room, 1) :], cut, characters, 0)
