"""LoRA or DoRA trained on a Zigzag model and on the dense matrices that it stands for, step by step alike.

    python -m benchmarks.adapters MODEL TEXT [--steps 50] [--kind lora] [--adapter FOLDER]

Both runs are mlx-lm's own trainer with one seed, the same windows of TEXT in the same order, and all blocks.
On a CPU the dense side of DoRA takes minutes a step: mlx-lm multiplies it by MLX's own product there.
Held-out windows are scored before and after. The adapter of the Zigzag run is then put on both models, which
write greedily from one prompt without skipping, and is fused. The last line of stdout is one JSON document.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers
import numpy as np
from mlx import nn
from mlx.utils import tree_unflatten

from benchmarks.machine import facts
from spqt_cli.adapt import fuse
from spqt_cli.decode import adapter_folder, session
from spqt_cli.decode.layers import ZigzagLinear
from spqt_cli.measure import many_rows, texts

RANK, SCALE, LEARNING_RATE = 8, 20.0, 1e-4
HELD_OUT, WRITTEN = 8, 48  # windows that are scored; tokens that are written


def dense_twin(model: nn.Module) -> nn.Module:
    """The model itself, every quantized layer replaced by the float32 matrix that its codes stand for."""
    places = []
    for path, module in model.named_modules():
        if isinstance(module, ZigzagLinear):
            places.append((path, _linear(module.dequantized(), module.get("bias"))))
        elif isinstance(module, nn.QuantizedLinear):
            places.append((path, _linear(_dequantized(module), module.get("bias"))))
        elif isinstance(module, nn.QuantizedEmbedding):
            dense = nn.Embedding(1, 1)
            dense.weight = _dequantized(module).astype(mx.float32)
            places.append((path, dense))
    model.update_modules(tree_unflatten(places))
    mx.eval(model.parameters())
    return model


def _linear(weight: mx.array, bias: mx.array | None) -> nn.Linear:
    dense = nn.Linear(1, 1, bias=False)
    dense.weight = weight.astype(mx.float32)
    if bias is not None:
        dense.bias = bias.astype(mx.float32)
    return dense


def _dequantized(module: Any) -> mx.array:
    packed = (module.weight, module.scales, module["biases"])
    return mx.dequantize(*packed, module.group_size, module.bits)


class Losses:
    """What mlx-lm's trainer reports: a mean of each ten steps."""

    def __init__(self) -> None:
        self.training: list[float] = []

    def on_train_loss_report(self, report: dict[str, Any]) -> None:
        self.training.append(report["train_loss"])
        print(f"  step {report['iteration']}: loss {report['train_loss']:.4f}", file=sys.stderr)

    def on_val_loss_report(self, report: dict[str, Any]) -> None:
        """Windows held out are scored by `trained`."""


def held_out(model: nn.Module, windows: list[list[int]], wishes: Any) -> float:
    """The loss on windows that are not trained on, in nats a token."""
    from mlx_lm.tuner.trainer import evaluate

    rows = [(each, 0) for each in windows[:HELD_OUT]]
    return float(evaluate(model, rows, batch_size=1, num_batches=-1, max_seq_length=wishes.length + 1))


def trained(model: nn.Module, windows: list[list[int]], wishes: Any, file: Path) -> dict[str, Any]:
    """Losses of a run of mlx-lm's trainer on a model, whose adapter is written into `file`."""
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    mx.random.seed(0)
    np.random.seed(0)
    model.freeze()
    parameters = {"rank": RANK, "scale": SCALE, "dropout": 0.0}
    linear_to_lora_layers(model, -1, parameters, use_dora=wishes.kind == "dora")
    before, losses = held_out(model, windows, wishes), Losses()
    train(
        model,
        mlx.optimizers.Adam(learning_rate=LEARNING_RATE),
        [(each, 0) for each in windows[HELD_OUT:]],
        args=TrainingArgs(
            batch_size=wishes.batch, iters=wishes.steps, steps_per_report=10, adapter_file=str(file),
            max_seq_length=wishes.length + 1,
        ),
        training_callback=losses,
    )  # fmt: skip
    config = {"fine_tune_type": wishes.kind, "num_layers": -1, "lora_parameters": parameters}
    (file.parent / adapter_folder.CONFIG).write_text(json.dumps(config))
    return {"before": before, "after": held_out(model, windows, wishes), "training": losses.training}


def written(model: nn.Module, tokens: list[int]) -> list[int]:
    """The tokens that a model writes greedily."""
    from mlx_lm.generate import generate_step

    steps = generate_step(mx.array(tokens), model, max_tokens=WRITTEN)
    return [int(token) for token, _ in steps]


@contextlib.contextmanager
def as_matrices(dense: bool) -> Iterator[None]:
    """Dense matrices by BLAS on a CPU, where MLX's own product takes minutes a step."""
    with many_rows.many_rows() if dense else contextlib.nullcontext():
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--kind", choices=["lora", "dora"], default="lora")
    parser.add_argument("--adapter", type=Path, help="keep the adapter of the Zigzag run here")
    wishes = parser.parse_args()
    tokenizer = session.load_tokenizer(Path(wishes.model))
    tokens = texts.tokens(texts.read(wishes.text), tokenizer)
    count = HELD_OUT + wishes.batch * wishes.steps
    windows = [tokens[at * wishes.length : (at + 1) * wishes.length] for at in range(count)]
    if len(windows[-1]) < wishes.length:
        sys.exit(f"{wishes.text} is too short: {len(tokens)} tokens")
    results, answers = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        kept = wishes.adapter or Path(temporary) / "zigzag"
        for name, folder in (("zigzag", kept), ("dense", Path(temporary) / "dense")):
            folder.mkdir(parents=True, exist_ok=True)
            model = session.load(wishes.model, dense=True).model
            model = dense_twin(model) if name == "dense" else model
            print(f"{name}:", file=sys.stderr)
            with as_matrices(name == "dense"):
                results[name] = trained(model, windows, wishes, folder / adapter_folder.WEIGHTS)
        fused = session.load(fuse.fuse(wishes.model, kept, Path(temporary) / "fused").output, dense=True)
        results["fused"] = {"after": held_out(fused.model, windows, wishes)}
        for name in ("zigzag", "dense"):
            model = session.load(wishes.model, dense=True).model
            model = dense_twin(model) if name == "dense" else model
            adapter_folder.put_on(model, kept)
            with as_matrices(name == "dense"):
                answers[name] = written(model, windows[0][:32])
    drops = {name: results[name]["before"] - results[name]["after"] for name in answers}
    document = {
        "what": f"{wishes.kind}, {wishes.steps} steps of {wishes.batch} x {wishes.length} tokens",
        "settings": {"rank": RANK, "scale": SCALE, "learning_rate": LEARNING_RATE, "adam": True},
        "results": results,
        "loss_lowered_zigzag_over_dense": drops["zigzag"] / drops["dense"],
        "greedy_tokens": len(answers["dense"]),
        "of_them_equal": sum(a == b for a, b in zip(*answers.values(), strict=False)),
        "machine": facts(),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
