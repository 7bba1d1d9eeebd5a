"""A real model step by step on this device's kernels, against the masked stock path and the definition.

    python -m benchmarks.check_decode --model models/SmolLM2-135M-Instruct-spqt-4bit --output check.json
    python -m benchmarks.check_decode --model MODEL --dtype float16 bfloat16 float32

Teacher-forced: every run reads the same tokens of the shipped calibration text, one at a time after a dense
prompt. There are two references, each with its own masks and cache:

- `stock`: MLX's own matmul on the masked input. For 16-bit types MLX's CUDA kernel for this layout rounds
  every weight, code * scale and then + bias, to that type before it multiplies;
- `exact`: the definition: the mask from x as it is, then weights, products and sums in float32, and one
  rounding to x's dtype at the end.

Against each, per run, stand the mean KL divergence, how often the likeliest token agrees, and the fraction of
channels that one run skips and the other keeps:

- `kernels_free`, `stock_free`, `dequantized_free`: with a cache of its own. Where a channel lies on its
  threshold any rounding flips it; a flip stays in the cache and moves all that follows, so free runs part;
- `kernels_same_cache`, ...: each step begins at the reference's cache. Masks are the run's own;
- `kernels_same_masks`: a cache of its own, but the reference's channels: rounding without flips.

`dequantized` is the masked input times weights dequantized in the scales' dtype, by MLX's plain matmul. With
16-bit scales it rounds weights as the stock kernel does, so it shows what stock drifts from itself, and,
against `exact`, what that rounding alone does. `--dtype` casts the whole model, scales too.

Launch by launch, on inputs recorded from the stock path, the kernels are held against float64: equal
counts, errors as fractions of the bound that metal/README.md derives. Works from a bare checkout.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, facts, from_bare_tree

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # the reference means float32 where it says so
from_bare_tree()
import mlx.core as mx
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from spqt_cli.backends import accuracy, select, stock
from spqt_cli.decode import phase, session
from spqt_cli.format import layout

TEXT = ROOT / "configs" / "calibration.txt"
# Mean KL, top-1 agreement and channels that differ, against the masked stock path.
BAR = {"mean_kl": 1e-3, "top_1_agreement": 0.99, "channels_that_differ": 1e-3}
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


ALMOST_ZERO = mx.array([1e-30])
RECORD_EVERY = 32  # steps between those whose launches are held against float64


class Run:
    """One way to compute all Zigzag products of a network; keeps what each step gave.

    rows: per step, log-probabilities (vocabulary,) float32; skipped: per step, (channels of all launches,)
    bool. With keep also masks, per step, launch and projection, and at times a launch's inputs.
    """

    def __init__(self, path: Any, *, keep: bool = False) -> None:
        self.path, self.keep = path, keep
        self.rows: list[mx.array] = []
        self.skipped: list[mx.array] = []
        self.masks: list[list[list[mx.array]]] = []
        self.launches: list[tuple[mx.array, Any]] = []
        self.now: list[list[mx.array]] = []  # the masks of the step under way

    def __call__(self, x: mx.array, layers: Any) -> Any:
        self.now.append([skipped(x, layer) for layer in layers])
        if self.keep and len(self.rows) % RECORD_EVERY == 0:
            self.launches.append((x, layers))
        return self.path(x, layers)

    def step(self, network: Any, token: int, cache: list) -> None:
        """One token through the network; starts the evaluation without waiting for it."""
        under_way[:] = [self]
        self.now = []
        with phase.decoding():
            logits = network(mx.array([[token]]), cache=cache)[0, -1].astype(mx.float32)
        self.rows.append(logits - mx.logsumexp(logits))
        self.skipped.append(mx.concatenate([mask for launch in self.now for mask in launch]))
        if self.keep:
            self.masks.append(self.now)
        mx.async_eval(self.rows[-1], self.skipped[-1], self.now if self.keep else [])


under_way: list[Run] = []  # the run whose step the network computes; none while a model is loaded and checked


def intercept() -> Any:
    """Sends the products of networks loaded later through `under_way`; returns the kernels' own path.

    Each step counts on from the one before, as in `spqt generate`.
    """
    native = select.prepare
    # A call of several products would hide their masks.
    select.prepare_gated = select.prepare_head = select.prepare_tail = lambda *_: None
    select.prepare = lambda layers: lambda x, _: (under_way[0] if under_way else path)(x, layers)
    steps: dict[tuple[int, ...], list[Any]] = {}

    def path(x: mx.array, layers: Any) -> Any:
        key = tuple(map(id, layers))
        if key not in steps:  # the layers are kept alive: their ids are the key
            steps[key] = [native(layers), mx.zeros(len(layers), mx.uint32), layers]
        step, before, _ = steps[key]
        outputs, steps[key][1] = step(x, before)
        return outputs, steps[key][1] - before

    return path


def skipped(x: mx.array, layer: Any) -> mx.array:
    """(inputs,) bool: where a launch skips a channel of x."""
    if layer.threshold is None:
        return mx.zeros(x.size, mx.bool_)
    return layout.inactive(x, layer.threshold).reshape(-1)


def masked(x: mx.array, layer: Any) -> mx.array:
    return x if layer.threshold is None else layout.mask(x, layer.threshold)


class Forced(Run):
    """The kernels on the masks of another run, in the order in which they were met."""

    def __init__(self, path: Any, given: Run) -> None:
        super().__init__(path)
        self.given = given
        self.kept: dict[int, Kept] = {}

    def __call__(self, x: mx.array, layers: Any) -> Any:
        masks = self.given.masks[len(self.rows)][len(self.now)]
        self.now.append(masks)
        outputs = []
        for layer, mask in zip(layers, masks, strict=True):
            kept = mx.where(mask.reshape(x.shape), mx.array(0, x.dtype), x)
            (y,), _ = self.path(kept, [self.kept.setdefault(id(layer), Kept(layer))])
            outputs.append(y)
        return outputs, mx.zeros(len(layers), mx.uint32)


class Kept:
    """A layer that skips exact zeros alone: what the kernels see when the masks are given."""

    threshold = ALMOST_ZERO

    def __init__(self, layer: Any) -> None:
        self.__dict__["layer"] = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.layer, name, value)

    def __getitem__(self, name: Any) -> Any:
        return self.layer[name]


def dequantized(x: mx.array, layers: Any) -> Any:
    """The masked input times dequantized weights, in the scales' dtype."""
    outputs = []
    for layer in layers:
        y = masked(x, layer) @ layer.dequantized().T
        outputs.append(y if layer.get("bias") is None else y + layer.bias)
    return outputs, mx.zeros(len(layers), mx.uint32)


def exact(x: mx.array, layers: Any) -> Any:
    """The definition in float32, rounded to x's dtype once."""
    outputs = []
    for layer in layers:
        y = masked(x, layer).astype(mx.float32) @ float32_weights(layer)
        y = y if layer.get("bias") is None else y + layer.bias.astype(mx.float32)
        outputs.append(y.astype(x.dtype))
    return outputs, mx.zeros(len(layers), mx.uint32)


def float32_weights(layer: Any) -> mx.array:
    """(inputs, outputs) float32, made once a layer: four bytes a weight."""
    made = layer.__dict__
    if "_float32_weights" not in made:
        scales, biases = layer.scales.astype(mx.float32), layer["biases"].astype(mx.float32)
        how = {"outputs": layer.outputs, "bits": layer.bits, "group_size": layer.group_size}
        made["_float32_weights"] = mx.contiguous(layout.dequantize(layer.weight, scales, biases, **how).T)
        mx.eval(made["_float32_weights"])
    return made["_float32_weights"]


def decode(
    loaded: session.Loaded, tokens: list[int], prompt: int, leader: Run, others: Sequence[Run] = ()
) -> Run:
    """Takes `leader` through all tokens; `others` first take each step from the leader's cache."""
    cache = make_prompt_cache(loaded.model)
    if others and not can_trim_prompt_cache(cache):
        raise SystemExit("this model's cache cannot step back, so runs cannot share it")
    mx.eval(loaded.model(mx.array([tokens[:prompt]]), cache=cache))
    for token in tokens[prompt:]:
        for other in others:
            other.step(loaded.model, token, cache)
            trim_prompt_cache(cache, 1)
        leader.step(loaded.model, token, cache)
    mx.eval(leader.rows, leader.skipped)
    return leader


def as_generated(loaded: session.Loaded, tokens: list[int], prompt: int) -> mx.array:
    """Log-probabilities (steps, vocabulary) float32 of a free run, decoded as `spqt generate` does it."""
    cache = make_prompt_cache(loaded.model)
    mx.eval(loaded.model(mx.array([tokens[:prompt]]), cache=cache))
    rows = []
    for token in tokens[prompt:]:
        with phase.decoding():
            logits = loaded.model(mx.array([[token]]), cache=cache)[0, -1].astype(mx.float32)
        rows.append(logits - mx.logsumexp(logits))
        mx.async_eval(rows[-1])
    return mx.stack(rows)


def distance(expected: Run, found: Run) -> dict[str, Any]:
    """How far one run is from another, and whether that is within BAR."""
    p, q = mx.stack(expected.rows), mx.stack(found.rows)
    divergence = (mx.exp(p) * (p - q)).sum(axis=-1)
    pairs = list(zip(expected.skipped, found.skipped, strict=True))
    flips = mx.stack([(one != other).sum() for one, other in pairs]).sum()
    row = {
        "mean_kl": float(divergence.mean()),
        "standard_error": float(mx.std(divergence, ddof=1)) / math.sqrt(divergence.size),
        "largest_kl": float(divergence.max()),
        "top_1_agreement": float((p.argmax(-1) == q.argmax(-1)).mean()),
        "channels_that_differ": float(flips) / sum(one.size for one, _ in pairs),
    }
    return {**row, "within_bar": within(row)}


def within(row: dict[str, float]) -> bool:
    """Whether a row meets BAR."""
    return row["top_1_agreement"] >= BAR["top_1_agreement"] and all(
        row[name] <= BAR[name] for name in ("mean_kl", "channels_that_differ")
    )


def compare_steps(native: Any, loaded: session.Loaded, tokens: list[int], prompt: int) -> dict[str, Any]:
    """The runs alone that take each step from the stock path's cache."""
    near_stock = {"kernels_same_cache": Run(native), "dequantized_same_cache": Run(dequantized)}
    at_stock = decode(loaded, tokens, prompt, Run(stock.sparse_gemv), list(near_stock.values()))
    return {"reference_stock": {name: distance(at_stock, run) for name, run in near_stock.items()}}


def compare(
    native: Any, loaded: session.Loaded, tokens: list[int], prompt: int, generated: mx.array
) -> dict[str, Any]:
    """The figures of one model; `error` is in units of the derived bound."""
    how = (loaded, tokens, prompt)
    near_stock = {"kernels_same_cache": Run(native), "dequantized_same_cache": Run(dequantized)}
    near_exact = {"kernels_same_cache": Run(native), "stock_same_cache": Run(stock.sparse_gemv)}
    at_stock = decode(*how, Run(stock.sparse_gemv, keep=True), list(near_stock.values()))
    at_exact = decode(*how, Run(exact, keep=True), list(near_exact.values()))
    free = decode(*how, Run(native))
    to_stock = {"kernels_free": free, "dequantized_free": decode(*how, Run(dequantized)), **near_stock}
    to_stock["kernels_same_masks"] = decode(*how, Forced(native, at_stock))
    to_exact = {"kernels_free": free, "stock_free": at_stock}
    to_exact |= {"dequantized_free": to_stock["dequantized_free"], **near_exact}
    to_exact["kernels_same_masks"] = decode(*how, Forced(native, at_exact))
    return {
        "reference_stock": {name: distance(at_stock, run) for name, run in to_stock.items()},
        "reference_exact": {name: distance(at_exact, run) for name, run in to_exact.items()},
        "launches": judged(native, at_stock.launches),
        "whole_blocks_against_kernels_free": {
            "mean_kl": float((mx.exp(generated) * (generated - mx.stack(free.rows))).sum(axis=-1).mean()),
            "largest_difference": float(mx.abs(generated - mx.stack(free.rows)).max()),
        },
    }


def judged(native: Any, launches: list[tuple[mx.array, Any]]) -> dict[str, Any]:
    """The kernels on recorded inputs against float64."""
    found = [accuracy.judge(x, layers, native(x, layers), native(x, layers)) for x, layers in launches]
    return {
        "checked": len(found),
        "worst_error_in_bounds": max(one.error for one in found),
        "counts_equal": all(one.counts for one in found),
        "bitwise_repeatable": all(one.repeated for one in found),
    }


def table(dtype: str, figures: dict[str, Any]) -> str:
    """Markdown rows."""
    lines = []
    for reference in ("reference_stock", "reference_exact"):
        for name, row in figures.get(reference, {}).items():
            kl = f"{row['mean_kl']:.2e} +- {row['standard_error']:.0e}"
            numbers = f"{kl} | {row['top_1_agreement']:.1%} | {row['channels_that_differ']:.3%}"
            verdict = "yes" if row["within_bar"] else "no"
            lines.append(f"| {dtype} | {reference[10:]} | {name} | {numbers} | {verdict} |")
    return "\n".join(lines)


def prepared(arguments: argparse.Namespace, dtype: str | None) -> tuple[session.Loaded, list[int], int]:
    """The model, loaded afresh because a cast rounds; the text's tokens; how many of them are the prompt."""
    under_way.clear()
    loaded = session.load(arguments.model)
    if dtype:
        loaded.model.set_dtype(DTYPES[dtype])
    text = TEXT.read_text(encoding="utf-8")
    tokens = loaded.tokenizer.encode(text)[: arguments.prompt + arguments.steps]
    return loaded, tokens, arguments.prompt


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.check_decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=32, help="tokens that run densely first")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="cast the model; default: as it is loaded")
    parser.add_argument(
        "--only-steps", action="store_true", help="only runs from the stock path's cache: for many steps"
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"model": arguments.model.name, "machine": facts(), "bar": BAR}
    print("| dtype | reference | run | mean KL | top-1 | channels that differ | within the bar |")
    print("|---|---|---|---|---|---|---|")
    dtypes = arguments.dtype or [None]
    wanted = {} if arguments.only_steps else {one: as_generated(*prepared(arguments, one)) for one in dtypes}
    native = intercept()
    for dtype in dtypes:
        began = time.perf_counter()
        how = prepared(arguments, dtype)
        figures = compare(native, *how, wanted[dtype]) if wanted else compare_steps(native, *how)
        tokens = how[1]
        result |= {"backend": select.backend().name, "steps": len(tokens) - arguments.prompt}
        result[dtype or "as_loaded"] = figures | {"seconds": round(time.perf_counter() - began, 1)}
        print(table(dtype or "as loaded", figures), flush=True)
        print(f"{result[dtype or 'as_loaded']['seconds']} s", flush=True)
        for name in ("launches", "whole_blocks_against_kernels_free"):
            print(f"{name}: {figures.get(name)}", flush=True)
        if arguments.output:
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
