"""mlx-lm's model for a checkpoint, and the checkpoint's tensors as that model's parameters, lazily.

It owns the meeting of config.json, mlx-lm's classes with their `sanitize`, and the tensors; it reads
no weights and decides nothing about layouts.
"""

import dataclasses
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from spqt_cli.convert import requantize
from spqt_cli.convert.source import Checkpoint, text_config
from spqt_cli.decode import exact
from spqt_cli.decode.architecture import classes
from spqt_cli.errors import AGAIN, SpqtError, UnsupportedError
from spqt_cli.format import checkpoint_files


def load(checkpoint: Checkpoint) -> tuple[nn.Module, dict[str, mx.array], dict[str, str]]:
    """Model, lazy weights by parameter, and parameter -> name in the checkpoint where it is one tensor.

    The weights are exactly the model's parameters; the model itself holds none of them. Experts that are
    stored in 4-bit floats stay as they are, in modules of MLX's for them. The checkpoint's config is settled
    first (`settle`).
    """
    if checkpoint.exact is None:
        _settle(checkpoint)
    model, weights, sources = _sanitized(checkpoint)
    if any(name.endswith(".scales") for name in weights):
        requantize.settle(model, weights, checkpoint)
    _check(model, weights, checkpoint)
    return exact.complete(model, checkpoint.exact or {}), weights, sources


def _settle(checkpoint: Checkpoint) -> None:
    from spqt_cli.convert.config import settle

    _check_layers(checkpoint)
    if checkpoint.gguf is None:  # its config is our own
        settle.settle(checkpoint, lambda config: build(config, checkpoint.name))
    checkpoint.exact = checkpoint.exact or {}


def _check_layers(checkpoint: Checkpoint) -> None:
    """Refuse a number of layers that would take long to build, before anything is built."""
    config = checkpoint.config
    layers = config.get("num_hidden_layers") or text_config(config).get("num_hidden_layers") or 0
    count = len(checkpoint.tensors)
    if not isinstance(layers, int) or layers > count:
        raise SpqtError(
            f"{checkpoint.name}: config.json says {layers!r} layers, but there are only {count} tensors",
            AGAIN,
        )


def build(config: dict[str, Any], name: str) -> nn.Module:
    """mlx-lm's model of a config, its weights random and never computed. name: of the checkpoint."""
    from mlx_lm.utils import _decode_tagged_floats

    config = _decode_tagged_floats(config)
    model_class, args_class = classes(config, name)
    try:
        model: nn.Module = model_class(args_class.from_dict(config))
    except NotImplementedError as error:
        raise UnsupportedError(f"{name}: mlx-lm's class can't do this: {error}", "see its source") from None
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, AssertionError) as error:
        lacking = _lacking(config, args_class)
        why = f"it does not say {checkpoint_files.named(lacking)}" if lacking else repr(error)
        raise SpqtError(
            f"{name}: config.json does not describe a {config['model_type']} model ({why})", AGAIN
        ) from None
    _check_vocabulary(model, config, name)
    return model


def _lacking(config: dict[str, Any], args_class: Any) -> list[str]:
    """The keys that a class's arguments can't do without, and that a config leaves out or null."""
    said = text_config(config)
    required = (one for one in dataclasses.fields(args_class) if one.default is dataclasses.MISSING)
    found = [one.name for one in required if one.default_factory is dataclasses.MISSING]
    return [key for key in found if said.get(key) is None and config.get(key) is None]


def _check_vocabulary(model: nn.Module, config: dict[str, Any], name: str) -> None:
    """Refuse a vocabulary that lacks tokens which the class forbids by their numbers, as phi3small's does."""
    forbidden = model.get("_dummy_tokenizer_ids")
    if forbidden is not None and (last := forbidden.max().item()) >= config["vocab_size"]:
        raise UnsupportedError(
            f"{name}: mlx-lm's {config['model_type']} class forbids token {last}, and vocab_size is"
            f" {config['vocab_size']}",
            "use a checkpoint with the whole vocabulary",
        )


def _sanitized(checkpoint: Checkpoint) -> tuple[nn.Module, dict[str, mx.array], dict[str, str]]:
    """Model, lazy weights by parameter, and parameter -> name in the checkpoint where it is one tensor."""
    model = build(checkpoint.config, checkpoint.name)
    loaded = checkpoint.weights()
    by_identity = {id(array): name for name, array in loaded.items()}
    weights = dict(loaded)  # sanitize may change its argument
    if hasattr(model, "sanitize"):
        try:
            weights = model.sanitize(weights)
        except (LookupError, ValueError, TypeError, AttributeError, AssertionError) as error:
            raise SpqtError(
                f"{checkpoint.name}: its tensors are not those of a {checkpoint.config['model_type']} model"
                f" ({error!r})",
                AGAIN,
            ) from None
    weights = _without_second_head(model, weights)
    sources = {name: by_identity[id(a)] for name, a in weights.items() if id(a) in by_identity}
    if checkpoint.gguf is not None and (made := weights.keys() - sources.keys()):
        raise UnsupportedError(
            f"{checkpoint.name}: mlx-lm would rearrange {checkpoint_files.named(made)}",
            "convert the HF original",
        )
    return model, weights, sources


def _without_second_head(model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """weights but for a stored head that is the embedding once more, where the class has no place for it."""
    from mlx.utils import tree_flatten

    wanted = dict(tree_flatten(model.parameters()))
    return {name: a for name, a in weights.items() if name in wanted or not name.endswith("lm_head.weight")}


def _check(model: nn.Module, weights: dict[str, mx.array], checkpoint: Checkpoint) -> None:
    """The tensors must be exactly the model's parameters, with their shapes."""
    from mlx.utils import tree_flatten

    wanted = dict(tree_flatten(model.parameters()))
    if missing := wanted.keys() - weights.keys():
        raise SpqtError(f"{checkpoint.name}: tensors are missing: {checkpoint_files.named(missing)}", AGAIN)
    if extra := weights.keys() - wanted.keys():
        raise SpqtError(
            f"{checkpoint.name}: tensors the model has no place for: {checkpoint_files.named(extra)}", AGAIN
        )
    for name, array in weights.items():
        if array.shape != (shape := wanted[name].shape):
            raise SpqtError(
                f"{checkpoint.name}: tensor {name} is {array.shape}, config.json asks for {shape}",
                AGAIN,
            )
