"""A real model step by step on this device's kernels, against the masked stock path.

    python benchmarks/check_decode.py --model models/SmolLM2-135M-Instruct-spqt-4bit --output check.json

Teacher-forced: every run reads the same tokens of the shipped calibration text, one at a time after a dense
prompt, each with a cache of its own. Three runs are held against the masked stock path:

- `free`: the kernels as they are used;
- `control`: the stock path with its sums in another order (masked input times dequantized weights). Where a
  channel lies on its threshold the smallest rounding flips it, and one flip moves all that follows; this row
  shows how much of `free` is that, and not the kernels;
- `same_masks`: the kernels on the channels that the stock path chose, so that rounding alone is left.

Each gets the mean KL divergence, how often the likeliest token agrees, and the share of channels that one run
skips and the other keeps. Launch by launch, on inputs recorded from the stock path, the kernels are also held
against float64: equal counts, errors within the bound that metal/README.md derives (1 is the bound).
Works from a bare checkout, where kernels lie beside the package.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from bench_decode_gpu import from_bare_tree
from machine import facts

from_bare_tree()
import mlx.core as mx  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

from spqt_cli import kernels, layout, model, selftest, stock  # noqa: E402

TEXT = Path(__file__).resolve().parent.parent / "configs" / "calibration.txt"
ALMOST_ZERO = mx.array([1e-30])
RECORD_EVERY = 32  # steps between those whose launches are held against float64


class Recorder:
    """Stands in for `kernels.sparse_gemv`: calls one path and keeps masks, and at times the inputs."""

    def __init__(self, path: Any) -> None:
        self.path, self.masks, self.launches, self.recording = path, [], [], False

    def __call__(self, x: mx.array, layers: Any) -> Any:
        self.masks.append([layout.inactive(x, layer.threshold).reshape(-1) for layer in layers])
        if self.recording:
            self.launches.append((x, layers))
        return self.path(x, layers)


class Kept(NamedTuple):
    """A layer that skips exact zeros alone: what the kernels see when the masks are given."""

    layer: Any

    def __getattr__(self, name: str) -> Any:
        return ALMOST_ZERO if name == "threshold" else getattr(self.layer, name)

    def __getitem__(self, name: Any) -> Any:
        return self.layer[name]


class Forced:
    """The kernels on masks of another run, in the order in which they were met."""

    def __init__(self, path: Any, masks: list[list[mx.array]]) -> None:
        self.path, self.given, self.masks, self.recording = path, iter(masks), [], False

    def __call__(self, x: mx.array, layers: Any) -> Any:
        masks = next(self.given)
        self.masks.append(masks)
        outputs = []
        for layer, mask in zip(layers, masks, strict=True):
            kept = mx.where(mask.reshape(x.shape), mx.array(0, x.dtype), x)
            (y,), _ = self.path(kept, [Kept(layer)])
            outputs.append(y)
        return outputs, mx.zeros(len(layers), mx.uint32)


def other_order(x: mx.array, layers: Any) -> Any:
    """The masked stock path by way of dequantized weights: the same terms, summed otherwise."""
    outputs = []
    for layer in layers:
        y = layout.mask(x, layer.threshold) @ layer.dequantized().T
        outputs.append(y if layer.get("bias") is None else y + layer.bias)
    return outputs, mx.zeros(len(layers), mx.uint32)


def decode(loaded: model.Loaded, tokens: list[int], prompt: int, path: Any) -> tuple[Any, list]:
    """Log-probabilities (steps, vocabulary) float32, and the masks of every launch."""
    kernels.sparse_gemv = path
    cache = make_prompt_cache(loaded.model)
    mx.eval(loaded.model(mx.array([tokens[:prompt]]), cache=cache))
    rows = []
    for step, token in enumerate(tokens[prompt:]):
        path.recording = step % RECORD_EVERY == 0
        logits = loaded.model(mx.array([[token]]), cache=cache)[0, -1].astype(mx.float32)
        rows.append(logits - mx.logsumexp(logits))
        mx.eval(rows[-1], path.masks)
    return mx.stack(rows), path.masks


def distance(expected: tuple[Any, list], found: tuple[Any, list]) -> dict[str, float]:
    """How far one run is from another."""
    (p, p_masks), (q, q_masks) = expected, found
    flat = [mx.concatenate([mask for launch in masks for mask in launch]) for masks in (p_masks, q_masks)]
    divergence = (mx.exp(p) * (p - q)).sum(axis=-1)
    return {
        "mean_kl": float(divergence.mean()),
        "largest_kl": float(divergence.max()),
        "top_1_agreement": float((p.argmax(-1) == q.argmax(-1)).mean()),
        "channels_that_differ": float((flat[0] != flat[1]).astype(mx.float32).mean()),
    }


def compare(loaded: model.Loaded, tokens: list[int], prompt: int) -> dict[str, Any]:
    """The figures of one model; `error` is in units of the derived bound."""
    native = kernels.sparse_gemv
    reference = Recorder(stock.sparse_gemv)
    expected = decode(loaded, tokens, prompt, reference)
    runs = {
        "free": Recorder(native),
        "control": Recorder(other_order),
        "same_masks": Forced(native, expected[1]),
    }
    result: dict[str, Any] = {"steps": len(tokens) - prompt}
    result |= {name: distance(expected, decode(loaded, tokens, prompt, run)) for name, run in runs.items()}
    judgements = [
        selftest.judge(x, layers, native(x, layers), native(x, layers)) for x, layers in reference.launches
    ]
    result["launches"] = {
        "checked": len(judgements),
        "worst_error_in_bounds": max(one.error for one in judgements),
        "counts_equal": all(one.counts for one in judgements),
        "bitwise_repeatable": all(one.repeated for one in judgements),
    }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=32, help="tokens that run densely first")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    loaded = model.load(arguments.model)
    tokens = loaded.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[: arguments.prompt + arguments.steps]
    result = {
        "model": arguments.model.name,
        "machine": facts(),
        "backend": kernels.backend().name,
        **compare(loaded, tokens, arguments.prompt),
    }
    text = json.dumps(result, indent=1)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
