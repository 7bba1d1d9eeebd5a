"""A request decodes in a batch as it does alone, on the CPU: equal tokens and equal bits of all logits.

What mlx-lm's own tests of its batches ask is asked here of models that skip 40 %: there a difference in the
last bit of one product changes which channels are skipped, and soon the text.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, batch_generate, generate_step
from mlx_lm.models import llama, qwen3
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors

from spqt_cli.backends import cpu
from spqt_cli.bench import models
from spqt_cli.convert import convert
from spqt_cli.decode import active_counts, fused, layers, phase, session
from tests.conftest import tiny_checkpoint
from tests.decode.test_fused_block import WIDTH, block, installed

USABLE, REASON = cpu.status()
pytestmark = pytest.mark.skipif(not USABLE, reason=REASON)
ARCHITECTURES = ("llama", "qwen2", "gemma3")  # biases in the second; in the third other norms, and windows
WINDOW = 24  # of gemma3: most requests go past it
LENGTHS = (3, 1, 17, 40, 2)
COUNT = 30  # tokens written


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request, tmp_path_factory) -> Any:
    return skipping(request.param, tmp_path_factory.mktemp(request.param)).model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> session.Loaded:
    return skipping("llama", tmp_path_factory.mktemp("one"))


def skipping(arch: str, base) -> session.Loaded:
    """A tiny model with thresholds that skip 40 % of the channels."""
    changes = {"sliding_window": WINDOW} if arch == "gemma3" else {}
    source = tiny_checkpoint(base / "source", arch, **changes)
    convert.convert(str(source), base / "model", convert.ConvertOptions(bits=4, group_size=32))
    made = session.load(base / "model")
    text = mx.array(np.random.default_rng(2).integers(5, 250, 48))
    fitted = models.fit_thresholds(made.model, 0.4, text, make_prompt_cache(made.model))
    for path, layer in layers.zigzag_layers(made.model).items():
        layer.set_threshold(fitted[path])
    return made


def prompt(length: int, seed: int = 5) -> list[int]:
    return np.random.default_rng([seed, length]).integers(5, 250, length).tolist()


PROMPTS = [prompt(length) for length in LENGTHS]


@dataclass
class Answer:
    """Tokens written, and before each the raw logits and the logarithms of probabilities."""

    tokens: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    log_p: list[np.ndarray] = field(default_factory=list)
    cache: Any = None

    def see(self, context: mx.array, logits: mx.array) -> mx.array:
        """A logits processor that changes nothing."""
        self.logits.append(np.array(logits).ravel())
        return logits

    def add(self, token: int, log_p: mx.array) -> None:
        self.tokens.append(int(token))
        self.log_p.append(np.array(log_p))


def alone(model, tokens, count=COUNT, others=(), **options) -> Answer:
    answer = Answer()
    steps = generate_step(
        mx.array(tokens), model, max_tokens=count, logits_processors=[answer.see, *others], **options
    )
    for token, log_p in steps:
        answer.add(token, log_p)
    return answer


class Batch:
    """Requests by their number; `run` lets all of them, or so many steps, be done."""

    def __init__(self, model, **options) -> None:
        self.generator, self.answers = BatchGenerator(model, **options), {}

    def add(self, tokens, count=COUNT, others=(), cache=None) -> int:
        answer = Answer()
        caches = None if cache is None else [cache]
        (uid,) = self.generator.insert([tokens], [count], caches, logits_processors=[[answer.see, *others]])
        self.answers[uid] = answer
        return uid

    def run(self, steps: int | None = None) -> list[Answer]:
        while (steps is None or steps > 0) and (found := self.generator.next_generated()):
            steps = None if steps is None else steps - 1
            for one in found:
                self.answers[one.uid].add(one.token, one.logprobs)
                self.answers[one.uid].cache = one.prompt_cache
        return list(self.answers.values())


def check_equal(found: Answer, expected: Answer) -> None:
    assert found.tokens == expected.tokens
    for name in ("logits", "log_p"):
        pairs = zip(getattr(found, name), getattr(expected, name), strict=False)
        differing = [step for step, (ours, theirs) in enumerate(pairs) if not np.array_equal(ours, theirs)]
        assert not differing, f"{name} of steps {differing}"


def test_bits_are_those_alone(model):
    batch = Batch(model)
    for tokens in PROMPTS:
        batch.add(tokens)
    answers = batch.run()
    for tokens, answer in zip(PROMPTS, answers, strict=True):
        assert len(answer.tokens) == COUNT
        check_equal(answer, alone(model, tokens))
    assert len({tuple(answer.tokens) for answer in answers}) == len(answers)  # they aren't all of one word


def test_requests_join_and_leave(model):
    """One joins after 4 steps, one is removed, one ends early, and one is left alone."""
    batch = Batch(model, completion_batch_size=8)
    first, second = batch.add(PROMPTS[2], 6), batch.add(PROMPTS[3], 20)
    batch.run(4)
    third, fourth = batch.add(PROMPTS[0], COUNT), batch.add(PROMPTS[4], 12)
    batch.run(5)
    batch.generator.remove([fourth])
    batch.run()
    for uid, tokens, count in ((first, 2, 6), (second, 3, 20), (third, 0, COUNT)):
        check_equal(batch.answers[uid], alone(model, PROMPTS[tokens], count))
    left = batch.answers[fourth]
    assert 0 < len(left.tokens) < 12
    assert left.tokens == alone(model, PROMPTS[4], 12).tokens[: len(left.tokens)]


def test_max_tokens_are_each_request_s_own(loaded):
    counts = [1, 9, 4, 2, 6]
    found = batch_generate(loaded.model, loaded.tokenizer, PROMPTS, max_tokens=counts, return_token_ids=True)
    for tokens, count, written in zip(PROMPTS, counts, found.token_ids, strict=True):
        expected = alone(loaded.model, tokens, count).tokens
        ends = [at for at, one in enumerate(expected) if one in loaded.tokenizer.eos_token_ids]
        assert written == expected[: min([count, *ends])]


def test_logits_processors_are_each_request_s_own(model):
    processors = [
        [],
        make_logits_processors(repetition_penalty=1.8),
        make_logits_processors(logit_bias={7: 50.0}),
        make_logits_processors(logit_bias={9: -50.0}, repetition_penalty=1.3),
    ]
    batch = Batch(model)
    for tokens, others in zip(PROMPTS, processors, strict=False):
        batch.add(tokens, 12, others)
    answers = batch.run()
    for tokens, others, answer in zip(PROMPTS, processors, answers, strict=False):
        check_equal(answer, alone(model, tokens, 12, others))
    assert set(answers[2].tokens) == {7}
    assert len(set(answers[1].tokens)) == 12


def test_caches_of_earlier_requests_go_on(model):
    """A second turn on the caches that a batch gave back, beside a request that has none."""
    batch = Batch(model)
    for tokens in PROMPTS[1:4]:
        batch.add(tokens, 9)
    caches = [answer.cache for answer in batch.run()]
    turns = [prompt(length, seed=8) for length in (6, 1, 11)]
    expected = [
        alone(model, turn, 12, prompt_cache=copy.deepcopy(cache))
        for turn, cache in zip(turns, caches, strict=True)
    ]
    again = Batch(model)
    for turn, cache in zip(turns, caches, strict=True):
        again.add(turn, 12, cache=cache)
    again.add(PROMPTS[0], 12)
    *found, new = again.run()
    for ours, theirs in zip(found, expected, strict=True):
        check_equal(ours, theirs)
    check_equal(new, alone(model, PROMPTS[0], 12))


def test_a_cache_given_back_is_the_one_alone(model):
    """Of its prompt and of all tokens but the last, which has been written and not been fed."""
    batch = Batch(model)
    for tokens in PROMPTS[1:4]:
        batch.add(tokens, 9)
    for tokens, answer in zip(PROMPTS[1:4], batch.run(), strict=True):
        kept = make_prompt_cache(model)
        alone(model, tokens, 8, prompt_cache=kept)  # feeds the eighth as well
        for ours, theirs in zip(answer.cache, kept, strict=True):
            assert ours.offset == len(tokens) + 9
            for a, b in zip(ours.keys_and_values(), theirs.keys_and_values(), strict=True):
                if type(ours) is KVCache:
                    assert mx.array_equal(a[:, :, : theirs.offset], b).item()


def test_prompts_in_the_same_parts_give_the_same(model):
    batch = Batch(model, prefill_step_size=16)
    for tokens in PROMPTS:
        batch.add(tokens, 6)
    for tokens, answer in zip(PROMPTS, batch.run(), strict=True):
        check_equal(answer, alone(model, tokens, 6, prefill_step_size=16))


def test_sampled_texts_with_keys_of_their_own(loaded):
    """Equal bits mean equal draws, where a sampler draws by a key that it is given."""

    def drawing(seed: int):
        keys = iter(mx.random.split(mx.random.key(seed), 2 * COUNT))
        return lambda log_p: mx.random.categorical(log_p, key=next(keys))

    generator, found = BatchGenerator(loaded.model, max_tokens=12), {}
    uids = generator.insert(PROMPTS, samplers=[drawing(at) for at in range(len(PROMPTS))])
    while responses := generator.next_generated():
        for one in responses:
            found.setdefault(one.uid, []).append(one.token)
    for at, uid in enumerate(uids):
        assert found[uid] == alone(loaded.model, PROMPTS[at], 12, sampler=drawing(at)).tokens


def test_counts_of_a_request_are_those_alone(loaded):
    """Each request's own share; and what was read is the union of what its step's rows need."""
    batch = Batch(loaded.model)
    with active_counts.counting() as together:
        uids = [batch.add(tokens, 12) for tokens in PROMPTS[:3]]
        batch.run()
    assert sorted(together.requests()) == uids
    for uid, tokens in zip(uids, PROMPTS, strict=False):
        with active_counts.counting() as counter:
            alone(loaded.model, tokens, 12)
        own = {id(share.layer): share for share in counter.shares()}
        for share in together.shares(uid):
            assert share.active == own[id(share.layer)].active
            assert share.active < share.read <= 1
        assert len(together.shares(uid)) == len(own)
    for share in together.shares():
        each = [one.active for uid in uids for one in together.shares(uid) if one.layer is share.layer]
        assert share.active == pytest.approx(np.mean(each))
        assert share.active < share.read <= min(1, sum(each))


# Below the loops: one module, rows of several sequences against each by itself.


def rows(count: int, width: int = WIDTH) -> mx.array:
    return mx.random.normal((count, 1, width), key=mx.random.key(count))


def padded(lengths: list[int], made) -> BatchKVCache:
    """A batched cache whose sequences have so many tokens, from their caches alone."""
    return BatchKVCache.merge([held(length, made) for length in lengths])


def held(length: int, made) -> KVCache:
    cache = KVCache()
    with phase.prompting():
        x = mx.random.normal((1, length, WIDTH), key=mx.random.key(100 + length))
        made(x, "causal" if length > 1 else None, cache)
    return cache


@pytest.mark.usefixtures("isa", "decode_steps")
@pytest.mark.parametrize("kind", [llama, qwen3], ids=["llama", "qwen3"])  # qwen3: attention by its own code
def test_a_block_s_rows_are_those_alone(kind, ops_of_ours):
    made, lengths = installed(block(kind)), [5, 130, 1, 64, 257]
    fused.install_attention(made.self_attn) if kind is llama else None
    batched, x = padded(lengths, made), rows(len(lengths))
    single = [held(length, made) for length in lengths]
    for step in range(3):
        y = made(x + step, batched.make_mask(1), batched)
        for at, cache in enumerate(single):
            assert mx.array_equal(y[at : at + 1], made(x[at : at + 1] + step, None, cache)).item()
    assert made.__dict__[fused.BLOCK].reason == ""


@pytest.mark.usefixtures("decode_steps")
def test_a_batched_step_is_three_operations(ops_of_ours, tmp_path):
    made = installed(block())
    fused.install_attention(made.self_attn)
    batched = padded([5, 9], made)
    made(rows(2), batched.make_mask(1), batched)  # makes room
    mx.eval(batched.state)
    mx.export_to_dot(str(tmp_path / "graph"), made(rows(2), batched.make_mask(1), batched))
    text = (tmp_path / "graph").read_text()
    assert [text.count(name) for name in ("SpqtHead", "SpqtTokenAttention", "SpqtTail")] == [1, 1, 1]
    assert not any(name in text for name in ("ScaledDot", "SpqtSparseGemv", "Concatenate", "SliceUpdate"))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("decodes", [True, False])
@pytest.mark.parametrize("count", [2, 3, 9, 64, 65])
def test_a_layer_s_rows_are_those_alone(count, decodes):
    layer = layers.ZigzagLinear.from_linear(nn.Linear(96, 160), 32, 5)
    layer.set_threshold(0.6)
    x = rows(count, 96)
    with phase.decoding() if decodes else phase.prompting():
        y = layer(x)
        for at in range(count):
            assert mx.array_equal(y[at : at + 1], layer(x[at : at + 1])).item()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_head_s_rows_are_those_alone(bits, group, ops_of_ours):
    embedding = nn.QuantizedEmbedding.from_embedding(nn.Embedding(300, 384), group, bits)
    for count in (2, 3, 7):
        x = rows(count, 384)
        y = embedding.as_linear(x)
        for at in range(count):
            assert mx.array_equal(y[at : at + 1], embedding.as_linear(x[at : at + 1])).item()


@pytest.fixture
def ops_of_ours():
    from spqt_cli.decode import hooks_cpu

    hooks_cpu.install()
    yield
    hooks_cpu.remove()
