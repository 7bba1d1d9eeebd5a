"""What mlx-lm's class of an architecture leaves out of a config: rotary positions and windows, put in.

The converted folder says it in the `spqt` section of config.json, and the hook into mlx-lm (`patch`) puts it
into each model that is built of such a config:

    "ropes": [{"paths": ["model.layers.0.self_attn.rope"], "angles": [1.0, ...], "scale": 1.0}]
    "windows": [4096, null, ...]   tokens that each layer sees

`context` of the same section is the length up to which the model is right (`context.py`).
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from spqt_cli.decode import context, foreign
from spqt_cli.errors import SpqtError


class ExactRoPE(nn.Module):
    """Rotary positions by a table.

    angles: radians per position of each pair, (dims / 2,). traditional: whether neighbours are a pair.
    scale: factor on the rotated channels alone.
    """

    def __init__(self, angles: list[float], scale: float, traditional: bool) -> None:
        super().__init__()
        self.dims, self.mscale, self.traditional = 2 * len(angles), scale, traditional
        self._freqs = 1.0 / mx.array(angles, dtype=mx.float32)

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        if self.mscale != 1.0:
            x = x.at[..., : self.dims].multiply(self.mscale)
        return mx.fast.rope(
            x, self.dims, traditional=self.traditional, base=None, scale=1.0, offset=offset, freqs=self._freqs
        )


def complete(model: nn.Module, section: dict[str, Any]) -> nn.Module:
    """The model itself, with the ropes and windows that a config's `spqt` section lists.

    Raises SpqtError where the section is damaged.
    """
    try:
        for entry in section.get("ropes") or []:
            for path in entry["paths"]:
                _replace_rope(model, path, entry)
        if windows := section.get("windows"):
            _put_windows(model, windows)
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, OverflowError) as error:
        raise SpqtError(
            f"the spqt section of config.json is damaged ({error!r})", "convert the model again"
        ) from None
    return model


def classes(get: Callable[..., Any], config: dict[str, Any]) -> tuple[Any, Any]:
    """mlx-lm's (model class, its arguments' class) by `get`, the first completed as the config says."""
    model_class, args_class = get(config)
    section = config.get("spqt")
    if not isinstance(section, dict):
        return model_class, args_class

    def build(args: Any) -> nn.Module:
        model = complete(model_class(args), section)
        context.tell(model, config)
        return model

    return build, args_class


def _replace_rope(model: nn.Module, path: str, entry: dict[str, Any]) -> None:
    """Put a table in the place of the rotary module at `path`."""
    owner: Any = model
    *names, last = path.split(".")
    for name in names:
        owner = owner[int(name)] if isinstance(owner, list) else owner[name]
    traditional = bool(getattr(owner[last], "traditional", False))
    owner[last] = ExactRoPE([float(each) for each in entry["angles"]], float(entry["scale"]), traditional)


def windowed_layers(model: nn.Module) -> list[nn.Module] | None:
    """The layers of a model where each has one attention whose mask can be replaced; None for others."""
    layers = getattr(model, "layers", None)
    if not isinstance(layers, list) or not all("self_attn" in layer for layer in layers):
        return None
    return layers


def _put_windows(model: nn.Module, windows: list[int | None]) -> None:
    from mlx_lm.models.cache import KVCache, RotatingKVCache

    layers = windowed_layers(model)
    if layers is None or len(layers) != len(windows):
        raise ValueError(f"{len(windows)} windows")
    for layer, window in zip(layers, windows, strict=True):
        attention: Any = layer["self_attn"]
        attention._window = None if window is None else int(window)
        foreign.change_class(attention, _windowed, computes_the_same=False)

    def make_cache() -> list[Any]:
        return [KVCache() if window is None else RotatingKVCache(max_size=window) for window in windows]

    target: Any = model
    target.make_cache = make_cache


def _windowed(kind: Any) -> Callable[..., Any]:
    """The call of an attention class with a mask of its own: the model's is that of its first layer."""
    from mlx_lm.models.base import create_attention_mask

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None, **kwargs: Any) -> mx.array:
        as_array = isinstance(mask, mx.array)
        mask = create_attention_mask(x, cache, window_size=self._window, return_array=as_array)
        return kind.__call__(self, x, mask, cache, **kwargs)

    return call
