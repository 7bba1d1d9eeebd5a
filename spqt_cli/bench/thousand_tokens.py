"""A tiny model decoded twice over the same 1,000 tokens: no NaN, and no bit that differs.

`spqt doctor --selftest` ends with it. Single kernels can be right and a model wrong: several in one graph,
buffers that are freed or reused too early, a step that reads what another still writes. So the two runs build
their graphs differently, one token at a time and several in one evaluation, and must agree in all bits.
"""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from spqt_cli.backends import select
from spqt_cli.backends.gpu import first_use
from spqt_cli.bench import models
from spqt_cli.decode import active_counts, phase
from spqt_cli.decode.layers import zigzag_layers

TOKENS = 1000
PROMPT_TOKENS = 8
AHEAD = 8  # tokens of the second run in one evaluation
# MLX 0.32.4's attention on CUDA is cuDNN's from 256 keys on, which is not repeatable (docs/log/kernels.md),
# so there the tokens fill several caches in turn.
REPEATABLE_KEYS = 255
SPARSITY = 0.5
BITS, GROUP_SIZE = 4, 64
# Wide enough that products of one launch and of two, with stripes to add up, both occur.
CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 512, "intermediate_size": 2048,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
LEGEND = (
    f"{TOKENS} tokens, twice: a model of {CONFIG['num_hidden_layers']} blocks, random weights, "
    f"{SPARSITY:.0%} skipped, decoded token by\n"
    f"token and {AHEAD} tokens to an evaluation; equal: of 2 x {TOKENS * CONFIG['vocab_size']:,} logits "
    "none is NaN or infinite, and no bit differs"
)


def rows(tokens: int = TOKENS, rounds: int = 1, config: dict[str, Any] = CONFIG) -> Iterator[dict[str, Any]]:
    """Rows of the self-test's table, one for each dtype that models compute in here.

    rounds: each of other `tokens` tokens and an empty cache. config: of the model. Kernels run unchecked, as
    in the rest of the table, so that it is them that are seen. The caller's random numbers are not kept.
    """
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    for dtype in (mx.float32,) if on_cpu else (mx.float16, mx.bfloat16):
        with first_use.suspended():
            try:
                fault = _fault_of_rounds(_model(dtype, config), tokens, rounds)
            except RuntimeError as error:  # MLX's word for a kernel that does not compile or start
                fault = str(error).strip().splitlines()[0][:60]
        yield {
            "kernel": f"{tokens * rounds} tokens, twice",
            "shape": f"{config['num_hidden_layers']} blocks of {config['hidden_size']}",
            "bits": BITS,
            "group": GROUP_SIZE,
            "dtype": str(dtype).rsplit(".", maxsplit=1)[-1],
            "worst error": fault or "equal",
            "pass": not fault,
        }


def _most_keys(tokens: int) -> int:
    """Positions of a cache within which attention is repeatable here."""
    return REPEATABLE_KEYS if mx.cuda.is_available() else PROMPT_TOKENS + tokens


def _model(dtype: mx.Dtype, config: dict[str, Any] = CONFIG) -> nn.Module:
    """The model with thresholds, evaluated."""
    mx.random.seed(models.SEED)
    model = models.random_model(config, BITS, GROUP_SIZE, dtype)
    models.evaluate(model)
    thresholds = models.fit_thresholds(model, SPARSITY, _tokens(64), _cache(model))
    for path, layer in zigzag_layers(model).items():
        layer.set_threshold(thresholds[path])
    return model


def _tokens(count: int, seed: int = models.SEED) -> mx.array:
    return mx.random.randint(0, CONFIG["vocab_size"], (count,), key=mx.random.key(seed))


def _fault_of_rounds(model: nn.Module, tokens: int, rounds: int) -> str:
    """As `_fault`, of the first round that has one; of the first cache, where one does not hold a round."""
    most = _most_keys(tokens) - PROMPT_TOKENS
    for each in range(rounds):
        for first in range(0, tokens, most):
            some = _tokens(PROMPT_TOKENS + tokens, models.SEED + each)[first:]
            if fault := _fault(model, some[: PROMPT_TOKENS + most]):
                where = [f"round {each}: "] * (rounds > 1) + [f"after {first} tokens: "] * (first > 0)
                return "".join([*where, fault])
    return ""


def _cache(model: nn.Module) -> list[Any]:
    from mlx_lm.models.cache import make_prompt_cache

    cache: list[Any] = make_prompt_cache(model)
    return cache


def _fault(model: nn.Module, some: mx.array) -> str:
    """What is wrong with the logits of two runs over some tokens, from which on; empty if nothing is."""
    first, second = _logits(model, some, 1), _logits(model, some, AHEAD)
    for name, logits in (("first", first), ("second", second)):
        wrong = np.array(~mx.isfinite(logits).all(axis=1))
        if wrong.any():
            return f"{wrong.sum()} tokens with NaN in the {name} run, from {wrong.argmax()} on"
    bits = mx.uint32 if first.dtype == mx.float32 else mx.uint16
    differs = np.array((first.view(bits) != second.view(bits)).any(axis=1))
    return f"{differs.sum()} tokens differ, from {differs.argmax()} on" if differs.any() else ""


def _logits(model: nn.Module, tokens: mx.array, ahead: int) -> mx.array:
    """(tokens after the prompt, vocabulary), as the model computed them; evaluated.

    ahead: tokens whose graphs are built before they are evaluated; 1 as mlx-lm's loop does it, each evaluated
    while the next is built.
    """
    cache, found = _cache(model), []
    mx.eval(model(tokens[None, :PROMPT_TOKENS], cache=cache))
    with active_counts.counting(select.backend().count_every):
        for start in range(PROMPT_TOKENS, tokens.size, ahead):
            with phase.decoding():
                built = [
                    model(tokens[None, at : at + 1], cache=cache)[0, -1]
                    for at in range(start, min(start + ahead, tokens.size))
                ]
            mx.async_eval(built)
            found += built
    stacked = mx.stack(found)
    mx.eval(stacked)
    return stacked
