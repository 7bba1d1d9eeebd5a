"""mlx-lm's loops tell prompt from generated tokens: texts and counts against full passes with masked rows.

Heads are 32 wide, weights float32 and thresholds skip half, so that a token run the other way moves logits by
far more than rounding does.
"""

import ast
import importlib
import inspect
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, batch_generate, generate_step, speculative_generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import does_model_support_input_embeddings

from spqt_cli.backends import select
from spqt_cli.bench import models
from spqt_cli.convert import convert
from spqt_cli.decode import active_counts, hooks_generate, phase, session
from spqt_cli.decode.layers import ZigzagLinear, zigzag_layers
from spqt_cli.decode.options import Options, Sampling
from spqt_cli.measure import probes
from tests.conftest import SIZES, random_weights, tiny_checkpoint, write_tokenizer
from tests.lib.backends import DEFINITION

PROMPTS = [[60], [70, 80], [90, 61, 62, 63, 64], [81, 82, 83, 84, 85, 86, 87, 88, 89]]
COUNT = 10  # tokens written


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("modes")
    source = tiny_checkpoint(base / "source", head_dim=32)
    convert.convert(str(source), base / "model", convert.ConvertOptions(bits=8, group_size=32))
    return base / "model"


@pytest.fixture(params=["own", "stock"])
def loaded(request, folder, monkeypatch) -> session.Loaded:
    """The model on this machine's own backend, and on MLX's matmul; half of all channels skipped."""
    if request.param == "stock":
        monkeypatch.setattr(select, "backend", lambda: DEFINITION)
    return half_skipped(session.load(folder))


def half_skipped(loaded: session.Loaded) -> session.Loaded:
    text = mx.array(np.random.default_rng(2).integers(5, 250, 48))
    fitted = models.fit_thresholds(loaded.model, 0.5, text, make_prompt_cache(loaded.model))
    for path, layer in zigzag_layers(loaded.model).items():
        layer.set_threshold(fitted[path])
    return loaded


class Recorded(probes.Masking):
    """Masking that keeps what it was asked to mask, by path."""

    def apply(self, path: str, x: mx.array, rows: np.ndarray | None = None) -> mx.array:
        self.__dict__.setdefault("inputs", {})[path] = x
        return super().apply(path, x, rows)


def masked_pass(network, tokens: list[int], prompt_tokens: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The oracle: logits (length, vocab) of one pass, rows after the prompt masked; inputs by path."""
    values = {path: layer.threshold.item() for path, layer in zigzag_layers(network).items()}
    masking, rows = Recorded(values), np.arange(len(tokens))[None] >= prompt_tokens
    with probes.probing(network) as harness, harness.masked(masking, rows):
        logits = network(mx.array([tokens]))[0]
        inputs = {path: np.array(x).reshape(len(tokens), -1) for path, x in masking.inputs.items()}
    return np.array(logits), inputs


def continued(network, prompt: list[int], count: int = COUNT) -> list[int]:
    """Greedy tokens after a prompt, by the oracle."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(masked_pass(network, tokens, len(prompt))[0][-1].argmax()))
    return tokens[len(prompt) :]


def alone(network, prompt: list[int], count: int = COUNT, **options) -> list[int]:
    return [int(token) for token, _ in generate_step(mx.array(prompt), network, max_tokens=count, **options)]


def together(network, prompts, counts, late=()) -> list[list[int]]:
    """Tokens of each prompt, all decoded at once; those of `late` join after three steps."""
    batch = BatchGenerator(network, prefill_step_size=4)
    found = {uid: [] for uid in batch.insert(prompts, counts)}
    step = 0
    while responses := batch.next_generated():
        for one in responses:
            found[one.uid].append(one.token)
        step += 1
        if step == 3 and late:
            found |= {uid: [] for uid in batch.insert(list(late), [COUNT] * len(late))}
    return list(found.values())


def test_alone_a_text_is_the_oracle_s(loaded):
    for prompt in PROMPTS:
        expected = continued(loaded.model, prompt)
        assert alone(loaded.model, prompt) == expected
        assert alone(loaded.model, prompt, prefill_step_size=3) == expected  # leaves a rest of one row
        cache = make_prompt_cache(loaded.model)
        loaded.model(mx.array([prompt[:-1]]), cache=cache) if len(prompt) > 1 else None
        assert alone(loaded.model, prompt[-1:], prompt_cache=cache) == expected


@pytest.mark.parametrize("prompt", PROMPTS)
def test_fault_47_the_first_token_s_logits_are_the_dense_model_s(loaded, prompt):
    def two_steps(**options):
        steps = generate_step(mx.array(prompt), loaded.model, max_tokens=2, **options)
        return [np.array(log_p) for _, log_p in steps]

    found, in_parts = two_steps(), two_steps(prefill_step_size=1)
    for layer in zigzag_layers(loaded.model).values():
        layer.set_threshold(None)
    first, second = two_steps()
    # float32 in another order of summation
    assert np.allclose(found[0], first, rtol=1e-4, atol=1e-4)
    assert np.allclose(in_parts[0], first, rtol=1e-4, atol=1e-4)
    assert np.abs(found[1] - second).max() > 0.1


def test_in_a_batch_each_text_is_as_alone(loaded):
    """Prompts of several lengths, a joining one, and a last one left by the others."""
    counts, late = [3, COUNT + 4, 5, 8], [[100, 101, 102]]
    found = together(loaded.model, PROMPTS, counts, late)
    for prompt, count, tokens in zip([*PROMPTS, *late], [*counts, COUNT], found, strict=True):
        assert tokens == alone(loaded.model, prompt, count)
        assert tokens == continued(loaded.model, prompt, count)


def test_batch_generate_gives_each_text_as_alone(loaded):
    found = batch_generate(loaded.model, loaded.tokenizer, PROMPTS, max_tokens=6, return_token_ids=True)
    for prompt, tokens in zip(PROMPTS, found.token_ids, strict=True):
        assert tokens == alone(loaded.model, prompt, 6)[: len(tokens)]
        assert (
            len(tokens) == 6 or alone(loaded.model, prompt, 6)[len(tokens)] in loaded.tokenizer.eos_token_ids
        )


@pytest.mark.parametrize("prompt", PROMPTS[:3])
def test_drafts_do_not_change_the_text(loaded, folder, prompt):
    dense = session.load(folder, dense=True).model  # agrees often, not always
    expected = continued(loaded.model, prompt)
    for draft, count in ((dense, 1), (dense, 3), (loaded.model, 2)):
        steps = speculative_generate_step(
            mx.array(prompt), loaded.model, draft, num_draft_tokens=count, max_tokens=COUNT
        )
        tokens, _, drafted = zip(*steps, strict=True)
        assert list(tokens) == expected
        if draft is loaded.model:  # which drafts as the target decodes, so that only the ends are its own
            assert sum(drafted) >= COUNT * 2 // 3 - 1


def test_embeddings_are_prompt_too(loaded):
    network, prompt = loaded.model, PROMPTS[2]
    embeddings = network.model.embed_tokens(mx.array(prompt))
    for given in (mx.array(prompt), mx.array([], mx.int32)):
        steps = generate_step(given, network, input_embeddings=embeddings, max_tokens=COUNT)
        assert [int(token) for token, _ in steps] == continued(network, prompt)


def test_counts_in_a_batch_are_numpy_s(loaded):
    with active_counts.counting() as counter:
        found = together(loaded.model, PROMPTS, [3, COUNT + 4, 5, 8])
    rows: dict[str, list[np.ndarray]] = {path: [] for path in zigzag_layers(loaded.model)}
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        # a batch runs one step ahead of what it gives, so the last token has been fed as well
        for path, x in masked_pass(loaded.model, [*prompt, *tokens], len(prompt))[1].items():
            rows[path].append(x[len(prompt) :])
    shares = {id(share.layer): share for share in counter.shares()}
    for path, layer in zigzag_layers(loaded.model).items():
        kept = np.abs(np.concatenate(rows[path])) >= layer.threshold.item()
        # a few of some thousand channels lie so near the threshold that rounding decides
        assert shares[id(layer)].active == pytest.approx(kept.mean(), abs=2e-3)
        assert shares[id(layer)].active < min(0.7, shares[id(layer)].read)


def test_counts_with_a_draft_model_are_numpy_s(folder, monkeypatch):
    """On MLX's matmul, where each product is a call of its layer: all that is fed can be recorded."""
    from spqt_cli.decode import generate

    monkeypatch.setattr(select, "backend", lambda: DEFINITION)
    loaded, draft = half_skipped(session.load(folder)), half_skipped(session.load(folder))
    for layer in zigzag_layers(draft.model).values():
        layer.set_threshold(layer.threshold * 0.7)
    fed: dict[int, list[np.ndarray]] = {}
    call = ZigzagLinear.__call__

    def record(layer, x):
        if phase.decodes():
            fed.setdefault(id(layer), []).append(np.abs(np.array(x).reshape(-1, x.shape[-1])))
        return call(layer, x)

    monkeypatch.setattr(ZigzagLinear, "__call__", record)
    loaded.draft = session.Draft(draft.model, draft.config)
    options = Options(max_tokens=12, num_draft_tokens=3)
    *_, statistics = generate.stream(loaded, PROMPTS[2], Sampling(), options)
    read, dense, skipped = 0.0, 0.0, []
    for one in (loaded, draft):
        other, sizes = session.weight_bytes(one.model, one.config)
        left_out = 0.0
        for layer in zigzag_layers(one.model).values():
            size, kept = sizes[id(layer)], [x >= layer.threshold.item() for x in fed[id(layer)]]
            read += sum(size * (step.mean() if len(step) == 1 else 1.0) for step in kept)
            left_out += size * (1 - np.concatenate(kept).mean())
        steps = len(kept)
        read, dense = read + other * steps, dense + (other + sum(sizes.values())) * steps
        skipped.append(left_out / sum(sizes.values()))
    assert [statistics.sparsity, statistics.draft_sparsity] == pytest.approx(skipped, rel=1e-6)
    assert statistics.weight_bytes_per_token == pytest.approx(read / statistics.generation_tokens)
    assert statistics.dense_weight_bytes_per_token == pytest.approx(dense / statistics.generation_tokens)
    assert 0.3 < statistics.draft_sparsity < statistics.sparsity
    assert f"({statistics.draft_sparsity:.1%} of the draft model's)" in statistics.line()


CONFIGS = {
    "mamba": {
        "model_type": "mamba", "state_size": 16, "conv_kernel": 4, "use_bias": False,
        "use_conv_bias": True, "time_step_rank": 48, "tie_word_embeddings": True,
        **{key: SIZES[key] for key in SIZES if key not in ("head_dim", "torch_dtype")},
    },
    "dbrx": {
        "model_type": "dbrx", "vocab_size": SIZES["vocab_size"], "d_model": 128, "n_layers": 2, "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_products_made_token_by_token_are_dense_in_prompts(name, tmp_path):
    """mamba's x_proj and dt_proj, dbrx's experts: their models call them with one row at a time."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(CONFIGS[name]))
    weights = random_weights(CONFIGS[name], seed=1)
    mx.save_safetensors(str(tmp_path / "source" / "model.safetensors"), weights, metadata={"format": "mlx"})
    write_tokenizer(tmp_path / "source")
    options = convert.ConvertOptions(bits=8, group_size=32)
    convert.convert(str(tmp_path / "source"), tmp_path / "out", options)
    network = session.load(tmp_path / "out").model
    layers = zigzag_layers(network).values()
    assert any("x_proj" in path or "experts" in path for path in zigzag_layers(network))

    def log_p(prompt, threshold):
        for layer in layers:
            layer.set_threshold(threshold)
        found = [np.array(one) for _, one in generate_step(mx.array(prompt), network, max_tokens=2)]
        return found[:2]

    for prompt in PROMPTS[:3]:
        (dense, following), (first, second) = log_p(prompt, None), log_p(prompt, 0.4)
        assert np.allclose(first, dense, rtol=1e-4, atol=1e-4)
        assert np.abs(second - following).max() > 0.01


def test_requests_in_two_threads_are_apart(loaded):
    """As when a server decodes while a library user reads a prompt."""
    expected = [alone(loaded.model, prompt) for prompt in PROMPTS[:2]]
    networks = [loaded.model, half_skipped(session.load(loaded.folder)).model]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(alone, networks, PROMPTS[:2])) == expected


# --- the hook and the installed mlx-lm

LOOPS = {
    "generate.generate_step", "generate.speculative_generate_step", "generate.PromptProcessingBatch.prompt",
    "generate.GenerationBatch._step",
    "evaluate.MLXLM._process_prompt", "evaluate.MLXLM._score_fn",  # these score texts in whole passes
}  # fmt: skip


def model_calls(path: Path) -> set[str]:
    """Functions of a module, and methods of its classes, in which a model is called with a cache."""
    scopes, found = [(path.stem, ast.parse(path.read_text()))], set()
    while scopes:
        name, scope = scopes.pop()
        for node in scope.body:
            if isinstance(node, ast.ClassDef):
                scopes.append((f"{name}.{node.name}", node))
            elif isinstance(node, ast.FunctionDef) and any(map(_calls_a_model, ast.walk(node))):
                found.add(f"{name}.{node.name}")
    return found


def _calls_a_model(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call) or all(word.arg != "cache" for word in node.keywords):
        return False
    return ast.unparse(node.func).rpartition(".")[2].lstrip("_") in ("model", "draft_model")


def test_the_hook_knows_every_loop_of_the_installed_mlx_lm():
    """A loop of a later mlx-lm that nobody told about decoding would run dense without a word."""
    modules = Path(mlx_lm.__file__).parent.glob("*.py")
    assert set().union(*map(model_calls, modules)) == LOOPS


def test_the_hook_stands_wherever_mlx_lm_looks_its_loops_up():
    loops = importlib.import_module("mlx_lm.generate")
    assert loops.generate_step is hooks_generate.generate_step is generate_step
    assert loops.speculative_generate_step is hooks_generate.speculative_generate_step
    assert importlib.import_module("mlx_lm.cache_prompt").generate_step is generate_step
    assert mlx_lm.stream_generate is loops.stream_generate is hooks_generate.stream_generate
    hooks_generate.install(loops)  # again changes nothing
    assert loops.generate_step is generate_step
    for name, stock_loop in hooks_generate._stock.items():
        assert inspect.signature(getattr(loops, name)) == inspect.signature(stock_loop)
        first = ["model", "tokenizer"] if name == "stream_generate" else ["prompt", "model"]
        assert list(inspect.signature(stock_loop).parameters)[:2] == first


def test_a_told_model_is_otherwise_the_model(loaded):
    told = hooks_generate.told(loaded.model, 3)
    assert told.layers is loaded.model.layers
    assert does_model_support_input_embeddings(told) is does_model_support_input_embeddings(loaded.model)
    plain = hooks_generate.told(loaded.model.model.layers[0].mlp, 3)
    assert not does_model_support_input_embeddings(plain)
