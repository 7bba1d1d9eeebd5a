"""What spqt replaces or calls of the insides of MLX, mlx-lm and lm-eval: one table, with the reasons.

`replace` and `change_class` are the only ways to change such an object, and `replace` refuses what the table
does not list. Nothing here runs on import.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import mlx.nn as nn

ANY_MODULE = "any nn.Module class"


class Hook(NamedTuple):
    """One attribute of a foreign module or class.

    owner: dotted path, or ANY_MODULE; parameters: names that our replacement or call relies on;
    by: the file of spqt_cli that replaces or calls it, below the package.
    """

    owner: str
    name: str
    parameters: tuple[str, ...]
    by: str
    reason: str


_LINEAR, _QUANTIZED = "mlx.nn.layers.linear.Linear", "mlx.nn.layers.quantized.QuantizedLinear"
_TABLE, _QUANTIZED_TABLE = (
    "mlx.nn.layers.embedding.Embedding",
    "mlx.nn.layers.quantized.QuantizedEmbedding",
)
_LOOPS = "mlx_lm.generate"
_SHARDING = "mlx.nn.layers.distributed"
_ATTENTION = ("q", "k", "v", "scale", "mask")

REPLACED = (
    Hook(_LINEAR, "to_quantized", ("self", "group_size", "bits", "mode"), "decode/hooks.py",
         "nn.quantize hands each layer's entry of config.json to it: the loader of Zigzag layers"),
    Hook("mlx_lm.models.switch_layers.SwitchLinear", "to_quantized", ("self", "group_size", "bits", "mode"),
         "decode/hooks.py", "likewise, of a mixture's experts"),
    Hook("mlx.nn.layers.base.Module", "load_weights", ("self", "file_or_weights", "strict"),
         "decode/hooks.py", "sees the whole model once its weights are in: fuses and profiles it"),
    Hook("mlx_lm.utils", "load_model", ("model_path", "lazy", "strict", "get_model_classes"),
         "decode/hooks.py", "load() does not forward get_model_classes, by which a class is completed"),
    Hook("mlx_lm.utils", "sharded_load", ("repo", "pipeline_group", "tensor_group", "return_config"),
         "decode/hooks.py", "fused calls are formed once a model is cut, and not before"),
    Hook("mlx.core.distributed", "all_sum", ("x", "group", "stream"), "decode/parallel.py",
         "where sharded_load waits for all processes, an error of one of them would be lost"),
    Hook(f"{_SHARDING}.QuantizedAllToShardedLinear", "from_quantized_linear",
         ("quantized_linear_layer", "segments", "group"), "decode/hooks_sharding.py",
         "shard_linear asks it for a layer's outputs on one process; it knows rows alone"),
    Hook(f"{_SHARDING}.QuantizedShardedToAllLinear", "from_quantized_linear",
         ("quantized_linear_layer", "segments", "group"), "decode/hooks_sharding.py", "likewise, of inputs"),
    Hook(_SHARDING, "shard_inplace", ("module", "sharding", "segments", "group"), "decode/hooks_sharding.py",
         "would cut Zigzag layers along the wrong axes and say nothing"),
    Hook(_LOOPS, "generate_step", ("prompt", "model"), "decode/hooks_generate.py",
         "tells prompt from generated tokens, which shapes do not"),
    Hook(_LOOPS, "speculative_generate_step", ("prompt", "model", "draft_model"),
         "decode/hooks_generate.py", "as generate_step, of both models"),
    Hook(_LOOPS, "stream_generate", ("model", "tokenizer", "prompt"), "decode/hooks_generate.py",
         "keeps a request to the context that a model is right up to"),
    Hook(f"{_LOOPS}.BatchGenerator", "insert_segments",
         ("self", "segments", "max_tokens", "caches"), "decode/hooks_generate.py", "likewise, in batches"),
    Hook("mlx_lm.perplexity", "eval_ppl", ("model", "data"), "decode/hooks_generate.py",
         "refuses windows beyond that context"),
    Hook("mlx_lm.server.ResponseGenerator", "_tokenize", ("self",), "decode/hooks_generate.py",
         "refuses prompts beyond that context, by an answer"),
    Hook(f"{_LOOPS}.PromptProcessingBatch", "prompt", ("self", "tokens"), "decode/hooks_generate.py",
         "batched prompts run dense; on the CPU one by one, so that each has the cache that it has alone"),
    Hook(f"{_LOOPS}.GenerationBatch", "__init__", ("self", "model"), "decode/hooks_generate.py",
         "feeds each prompt's last token, which is prompt"),
    Hook(f"{_LOOPS}.GenerationBatch", "next", ("self",), "decode/hooks_generate.py",
         "batched decode steps run sparse"),
    Hook("mlx.core.fast", "rms_norm", ("x", "weight", "eps"), "decode/hooks_cpu.py measure/many_rows.py",
         "MLX's CPU build is slow; ours has no gradient, so calibration puts MLX's back"),
    Hook("mlx.core.fast", "rope", ("dims", "traditional", "base", "scale", "offset", "freqs"),
         "decode/hooks_cpu.py measure/many_rows.py", "as rms_norm"),
    Hook("mlx.core.fast", "scaled_dot_product_attention", _ATTENTION,
         "decode/hooks_cpu.py measure/many_rows.py measure/many_texts.py",
         "as rms_norm; through BLAS while calibrating and sampling"),
    Hook("mlx_lm.models.cache.RotatingKVCache", "update_and_fetch", ("self", "keys", "values"),
         "decode/hooks_cpu.py",
         "attention to a ring takes its keys in the order of their tokens, alone and in batches"),
    Hook("mlx_lm.models.cache.BatchRotatingKVCache", "update_and_fetch", ("self", "keys", "values"),
         "decode/hooks_cpu.py", "likewise"),
    Hook("mlx.core", "logsumexp", ("keepdims",), "decode/hooks_cpu.py",
         "mlx-lm normalizes each token's logits by it"),
    Hook("mlx_lm.models.activations", "swiglu", ("gate", "x"), "decode/hooks_cpu.py",
         "MLX's compiled one takes a sixth of a prompt's time on one thread"),
    Hook(_QUANTIZED, "__call__", ("self", "x"),
         "decode/hooks_cpu.py measure/many_rows.py measure/many_texts.py",
         "row-grouped layers on the CPU, by our kernel or by BLAS"),
    Hook(_QUANTIZED_TABLE, "as_linear", ("self", "x"),
         "decode/hooks_cpu.py measure/many_rows.py measure/many_texts.py",
         "tied heads on the CPU, likewise"),
    Hook(_LINEAR, "__call__", ("self", "x"), "measure/many_rows.py measure/many_texts.py",
         "plain layers by BLAS"),
    Hook(_TABLE, "as_linear", ("self", "x"), "measure/many_rows.py measure/many_texts.py",
         "plain tied heads by BLAS"),
    Hook("mlx.core", "sigmoid", ("a",), "measure/many_texts.py",
         "numpy's exp takes a fourth of the time that MLX's CPU build does"),
    Hook("mlx.core", "tanh", ("a",), "measure/many_texts.py", "likewise"),
    Hook("mlx_lm.models.switch_layers", "_gather_sort", ("x", "indices"), "measure/probes.py",
         "rows of experts are told apart by position while a model is watched"),
    Hook(ANY_MODULE, "__call__", ("self",), "measure/probes.py",
         "calibration looks at what blocks are given; only known instances are looked at"),
    Hook(ANY_MODULE, "__class__", (), "decode/fused.py decode/exact.py",
         "one instance gets a subclass of its class: fused steps, and masks of windows"),
    Hook("mlx_lm.tuner.lora.LoRALinear", "from_base", ("linear", "r", "dropout", "scale"),
         "decode/adapters.py", "takes the layer's sizes from a weight in rows, which Zigzag layers have not"),
    Hook("mlx_lm.tuner.dora.DoRALinear", "from_base", ("linear", "r", "dropout", "scale"),
         "decode/adapters.py", "likewise"),
    Hook("mlx_lm.evaluate.MLXLM", "loglikelihood", ("self", "requests"), "evaluate/lm_eval.py",
         "scores endings as they decode; mlx-lm's runs them dense, like a prompt"),
    Hook("mlx_lm.evaluate.MLXLM", "loglikelihood_rolling", ("self", "requests"), "evaluate/lm_eval.py",
         "refuses tasks that have no prompt"),
    Hook("mlx_lm.server.ResponseGenerator", "__init__", ("self",), "cli/mlx_lm_server.py",
         "knows the generating thread, which must be told to end"),
    Hook("mlx_lm.server", "_make_sampler", ("args", "tokenizer"), "serve/generator.py",
         "its filters are compiled and kept for each value that requests send"),
)  # fmt: skip

_GENERATOR, _HANDLER = "mlx_lm.server.ResponseGenerator", "mlx_lm.server.APIHandler"

CALLED = (
    Hook("mlx_lm.utils", "_get_classes", ("config",), "decode/architecture.py decode/hooks.py",
         "mlx-lm's choice of a class by model_type; load_model has no other name for its default"),
    Hook(_LOOPS, "_merge_caches", ("caches",), "decode/hooks_generate.py",
         "prompts that ran one by one become a batch"),
    Hook("mlx_lm.utils", "_decode_tagged_floats", ("obj",), "convert/parameters.py",
         "infinities in config.json, as load_model reads them"),
    Hook("mlx_lm.models.base", "scaled_dot_product_attention",
         ("queries", "keys", "values", "cache", "scale", "mask"), "decode/attention_gpu.py",
         "the product that an attention's code is traced around: a copy of the code is given another one"),
    Hook("mlx_lm.models.base", "create_attention_mask", ("h", "cache", "window_size", "return_array"),
         "decode/exact.py", "a layer's own mask where the model makes one for all"),
    # Overridden in the subclasses of `spqt serve`.
    Hook(_GENERATOR, "_run_generate", ("self",), "serve/generator.py", "keeps what ended the thread"),
    Hook(_GENERATOR, "_generate", ("self",), "serve/generator.py", "warms up before it serves"),
    Hook(_GENERATOR, "_next_request", ("self", "timeout"), "serve/generator.py", "counts between steps"),
    Hook(_GENERATOR, "_tokenize", ("self",), "serve/generator.py",
         "is done in the request's thread, where it may fail"),
    Hook(_GENERATOR, "_is_batchable", ("self", "args"), "serve/generator.py", "no batches that can't grow"),
    Hook(_GENERATOR, "_serve_single", ("self", "request", "stream"), "serve/generator.py",
         "ends when its client has left"),
    Hook(_HANDLER, "_set_completion_headers", ("self", "status_code"), "serve/handler.py",
         "its errors become ours"),
    Hook(_HANDLER, "_set_cors_headers", ("self",), "serve/handler.py", "names the one page that asks"),
)  # fmt: skip


def replace(owner: Any, name: str, new: Any) -> Any:
    """Put `new` in the place of a foreign attribute; what was there. Raises KeyError for one not listed."""
    path = _path(owner)
    listed = {(hook.owner, hook.name) for hook in REPLACED}
    of_any = isinstance(owner, type) and issubclass(owner, nn.Module) and (ANY_MODULE, name) in listed
    if (path, name) not in listed and not of_any:
        raise KeyError(f"{path}.{name} is not in the table of what spqt replaces")
    before = getattr(owner, name)
    setattr(owner, name, new)
    return before


@contextmanager
def replaced(new: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """In this block (owner, name, new) are in their places."""
    before: list[tuple[Any, str, Any]] = []
    try:
        for owner, name, one in new:
            before.append((owner, name, replace(owner, name, one)))
        yield
    finally:
        for owner, name, old in reversed(before):
            replace(owner, name, old)


def replace_everywhere(owner: Any, name: str, new: Any) -> Any:
    """As `replace`, also in each loaded module that has imported the attribute by name.

    Where it was defined it stays: a function of ours that goes out again is not to be lost.
    """
    before = replace(owner, name, new)
    home = sys.modules.get(getattr(before, "__module__", ""))
    for module in list(sys.modules.values()):
        if module is home:
            continue
        for alias, value in list(getattr(module, "__dict__", {}).items()):
            if value is before:
                setattr(module, alias, new)
    return before


MakeCall = Callable[[Any], Callable[..., Any]]


def change_class(module: nn.Module, make_call: MakeCall, *, computes_the_same: bool) -> None:
    """Make `module` an instance of a subclass of its class, called by `make_call(its class)`.

    computes_the_same: by another way; `own_class` then gives the class as it was.
    """
    module.__class__ = _subclass(type(module), make_call, computes_the_same)


@cache
def _subclass(kind: Any, make_call: MakeCall, computes_the_same: bool) -> Any:
    body = {"__call__": make_call(kind), "__module__": kind.__module__}
    return type(kind.__name__, (kind,), body | ({"_own_class": kind} if computes_the_same else {}))


def own_class(module: nn.Module) -> Any:
    """The class whose code says what a module computes."""
    kind: Any = type(module)
    while "_own_class" in kind.__dict__:
        kind = kind._own_class
    return kind


def _path(owner: Any) -> str:
    return f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else str(owner.__name__)
