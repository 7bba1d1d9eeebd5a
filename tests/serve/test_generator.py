"""The generator's parts: the prompt cache, the sampler and the end of an answer's text."""

from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx_lm import sample_utils
from mlx_lm.models.cache import KVCache, RotatingKVCache

from spqt_cli.serve import generator
from spqt_cli.serve.sampling import make_sampler


def filled(kind, tokens: int):
    """A key-value cache of one layer that has seen so many tokens."""
    cache = kind() if kind is KVCache else kind(max_size=4)
    cache.update_and_fetch(mx.ones((1, 1, tokens, 4)), mx.ones((1, 1, tokens, 4)))
    return [cache]


def test_a_prompt_that_was_seen_whole_leaves_its_last_token_to_be_fed():
    cache = generator.PromptCache(2)
    cache.insert_cache("model", [1, 2, 3], filled(KVCache, 3))
    found, rest = cache.fetch_nearest_cache("model", [1, 2, 3])
    assert rest == [3]
    assert found[0].offset == 2
    assert cache.fetch_nearest_cache("model", [1, 2, 3, 4])[1] == [4]


def test_one_that_can_not_be_shortened_is_computed_anew():
    cache = generator.PromptCache(2)
    cache.insert_cache("model", [1, 2, 3, 4, 5, 6], filled(RotatingKVCache, 6))
    assert cache.fetch_nearest_cache("model", [1, 2, 3, 4, 5, 6]) == (None, [1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize(
    "wished",
    [{}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 5}, {"top_p": 0.9, "min_p": 0.05, "top_k": 20}],
    ids=str,
)
def test_the_sampler_draws_what_mlx_lms_own_draws(wished):
    logprobs = mx.random.normal((500, 64), key=mx.random.key(1)) * 2
    logprobs = logprobs - mx.logsumexp(logprobs, axis=-1, keepdims=True)
    settings = {"temperature": 0.8, "top_p": 1.0, "min_p": 0.0, "top_k": 0, **wished}
    ours = make_sampler(SimpleNamespace(sampling=SimpleNamespace(**settings)), None)
    theirs = sample_utils.make_sampler(settings.pop("temperature"), **settings)
    drawn = []
    for sampler in (ours, theirs):
        mx.random.seed(3)
        drawn.append(sampler(logprobs).tolist())
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 10


def test_without_temperature_the_likeliest_is_taken():
    settings = SimpleNamespace(temperature=0.0, top_p=1.0, min_p=0.0, top_k=0)
    sampler = make_sampler(SimpleNamespace(sampling=settings), None)
    assert sampler(mx.array([[0.1, 0.9], [0.8, 0.2]])).tolist() == [1, 0]
