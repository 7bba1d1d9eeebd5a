"""The sampler of one request: mlx-lm's filters, given their numbers as arrays.

mlx-lm compiles its filters with plain numbers as constants, once for each value that a request sends, and
keeps all of them; arrays are inputs, so that one compilation serves every request.
"""

import math
from typing import Any

import mlx.core as mx


def make_sampler(args: Any, tokenizer: Any) -> Any:
    """A function from log-probabilities (rows, vocabulary) to tokens (rows,), as mlx-lm's server makes one.

    args: its GenerationArguments, checked by serve/fields.py.
    """
    from mlx_lm import sample_utils

    wished = args.sampling
    if wished.temperature == 0:
        return sample_utils.greedy_sampler
    temperature: Any = mx.array(wished.temperature)
    top_p: Any = mx.array(wished.top_p)
    least = mx.array(math.log(wished.min_p)) if wished.min_p else None

    def sample(logprobs: mx.array) -> mx.array:
        if wished.top_p < 1:
            logprobs = sample_utils.apply_top_p(logprobs, top_p)
        if least is not None:
            floor = logprobs.max(axis=-1, keepdims=True) + least
            logprobs = mx.where(logprobs < floor, -mx.inf, logprobs)
        if wished.top_k:
            logprobs = sample_utils.apply_top_k(logprobs, wished.top_k)
        return sample_utils.categorical_sampling(logprobs, temperature)

    return sample
