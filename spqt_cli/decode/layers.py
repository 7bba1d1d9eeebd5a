"""ZigzagLinear: the layer that mlx-lm's models call, dense for prompts and sparse in decode steps.

phase.py says which of the two runs; the shape of x does not. It knows kernels and thresholds; it does not
know files or the hooks into mlx-lm.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from spqt_cli.backends import interface, select
from spqt_cli.decode import active_counts, phase
from spqt_cli.format import layout

# Names of layers of one module that read one input in mlx-lm's models. Where a model feeds them different
# arrays all the same, SharedInput notices and the result stays right.
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
ADAPTED = "linear"  # under which mlx-lm's adapters keep the layer that they are put around


class ZigzagLayer(nn.Module):
    """What a linear layer and a mixture's experts in the Zigzag layout have in common."""

    mode = "zigzag"
    always_dense = False  # true of a head: nothing of it is ever skipped
    biases: Any  # mx.array; MLX declares it optional, which it is in other quantization modes
    chosen = 1  # matrices that a token is multiplied by: of experts, those that it is sent to
    part: Any = None  # a sharding.Part where this is a process's part of a layer

    def __init__(self, outputs: int, bits: int, group_size: int, band: int) -> None:
        nn.Module.__init__(self)
        self.outputs, self.bits, self.group_size, self.band = outputs, bits, group_size, band
        object.__setattr__(self, "_threshold", None)

    shared_input: "SharedInput"

    def __getattr__(self, key: str) -> Any:
        """`shared_input` of a layer that runs alone, when it is first asked for: it refers back to the layer,
        and one that was cut up before it ran would stay in memory with all its weights.
        """
        if key == "shared_input":
            self.shared_input = self._shared([self])
            return self.shared_input
        return super().__getattr__(key)

    def take(self, plain: nn.Module, entry: dict[str, Any]) -> None:
        """Take a plain layer's weights, to be quantized when evaluated, and what config.json's entry says."""
        self.weight, self.scales, self.biases = layout.quantize(
            plain.weight, self.bits, self.group_size, self.band
        )
        if "bias" in plain:
            self.bias = plain.bias
        self.set_threshold(entry.get("threshold") or None)  # 0 skips nothing: dense is faster
        self.freeze()

    def _shared(self, layers: list[Any]) -> "SharedInput":
        """What runs layers of this kind, which read one input, in one launch."""
        return SharedInput(layers)

    @property
    def inputs(self) -> int:
        return int(self.weight.shape[-2])

    @property
    def size(self) -> int:
        """The weights that a token reads when nothing is skipped."""
        return int(self.inputs * self.outputs * self.chosen)

    @property
    def threshold(self) -> mx.array | None:
        """(1,) or (inputs,) float32, or None where the layer runs dense."""
        return self._threshold

    def set_threshold(self, threshold: float | mx.array | None) -> None:
        """Skip channels below `threshold` in decode steps; None makes the layer dense.

        Of a layer that was cut over processes it may be that of all its channels.
        """
        if threshold is not None:
            threshold = mx.array(threshold, dtype=mx.float32).reshape(-1)
            if self.part is not None:
                threshold = self.part.threshold(threshold)
            mx.eval(threshold)  # a lazy constant would belong to this thread's stream alone
        # Not as nn.Module would keep it: reading an array attribute of a module takes microseconds.
        object.__setattr__(self, "_threshold", threshold)
        if "shared_input" in self.__dict__:
            self.shared_input.forget()

    def dequantized(self) -> mx.array:
        """The matrix (outputs, inputs), or experts (experts, outputs, inputs), that the weights stand for."""
        return layout.dequantize(
            self.weight,
            self.scales,
            self["biases"],
            outputs=self.outputs,
            bits=self.bits,
            group_size=self.group_size,
        )

    def _extra_repr(self) -> str:
        return (
            f"input_dims={self.inputs}, output_dims={self.outputs}, bias={'bias' in self}, "
            f"group_size={self.group_size}, bits={self.bits}, mode={self.mode}, band={self.band}"
        )


class ZigzagLinear(ZigzagLayer, nn.QuantizedLinear):
    """A linear layer in the Zigzag layout.

    weight: (bands, inputs, band * bits / 32) uint32; scales, biases: (bands, inputs, band / group_size);
    bias: (outputs,) or absent. A subclass of QuantizedLinear, so that mlx-lm's size accounting works
    and its tools see a layer to put adapters around (adapters.py), or refuse it, and don't pass over it.
    """

    @classmethod
    def from_linear(
        cls,
        linear_layer: nn.Module,
        group_size: int = 64,
        bits: int = 4,
        mode: str = "zigzag",
        *,
        spqt: dict[str, Any] | None = None,
    ) -> Self:
        """A layer whose weights are `linear_layer`'s, quantized when evaluated.

        mlx-lm calls this on a layer with random weights and loads the packed ones over it, so nothing
        may be evaluated here. spqt: the layer's entry in config.json: `band` and `threshold`.
        Raises ValueError for another mode than "zigzag".
        """
        if mode != cls.mode:
            raise ValueError(f"a Zigzag layer has no mode {mode!r}")
        entry = spqt or {}
        outputs, _ = linear_layer.weight.shape
        band = entry.get("band") or layout.band_of(outputs, group_size)
        layer = cls(outputs, bits, group_size, band)
        layer.take(linear_layer, entry)
        return layer

    def __call__(self, x: mx.array) -> mx.array:
        y = self._product(x)
        return y if self.part is None else self.part.finish(y)

    def _product(self, x: mx.array) -> mx.array:
        decodes = phase.decodes()
        if x.size == x.shape[-1] and (decodes or not self.shared_input.skips):
            return self.shared_input.product(x, self)
        few = x.size <= select.MOST_ROWS * x.shape[-1] or interface.is_token_each(x)
        if decodes and few and x.size:
            return self.shared_input.product(x, self)
        if decodes and self._threshold is not None:
            return self._masked(x, self._threshold)
        return select.matmul(x, self) if decodes else self._differentiable(x)

    def _differentiable(self, x: mx.array) -> mx.array:
        """y for x (..., inputs), all channels. Its gradient by x is the backend's product, by scales and
        biases MLX's. Unfrozen layers are left to their backend, which refuses to differentiate by codes.
        """
        if self.trainable_parameters():
            return select.matmul(x, self)
        forward = mx.custom_function(lambda x, scales, biases: select.matmul(x, self))

        def backward(primals: list[mx.array], slope: mx.array, _: mx.array) -> list[mx.array]:
            x, scales, biases = primals

            def stock(scales: mx.array, biases: mx.array) -> mx.array:
                form = {"outputs": self.outputs, "bits": self.bits, "group_size": self.group_size}
                return layout.matmul(x, self["weight"], scales, biases, **form)

            by_x = select.matmul_transposed(slope, self).astype(x.dtype)
            return [by_x, *mx.vjp(stock, [scales, biases], [slope])[1]]

        forward.vjp(backward)
        return cast(mx.array, forward(x, self["scales"], self["biases"]))

    def _masked(self, x: mx.array, threshold: mx.array) -> mx.array:
        """y for x (..., inputs) of many rows, each masked by itself; all weights are read."""
        if counter := active_counts.current():
            rows = x.reshape(-1, x.shape[-1])
            counter.count_rows(self, self.inputs - layout.inactive(rows, threshold).sum(axis=1))
        return select.matmul(layout.mask(x, threshold), self)


class SharedInput:
    """Projections that read the same input (q/k/v; gate/up; or one alone) and so run in one launch.

    A model calls them one after another with one array. The first call computes all products; each other
    layer then fetches its own. A layer that is called with another array, or again, computes anew.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self._alone = [self]  # as a tally wants its groups
        self._x: mx.array | None = None  # the array whose products lie in `_outputs`, until all are fetched
        self._outputs: dict[int, mx.array] = {}
        self.forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The same for the copied layers; what was prepared belongs to the old ones."""
        memo[id(self)] = made = type(self)([])
        made.layers.extend(copy.deepcopy(layer, memo) for layer in self.layers)
        return made

    @property
    def skips(self) -> bool:
        """Whether any of the layers has a threshold."""
        return any(layer.threshold is not None for layer in self.layers)

    def forget(self) -> None:
        """Prepare anew before the next product: a threshold has changed."""
        self._step: Any = None
        self._skips = False
        self._weights: list[tuple[ZigzagLayer, mx.array]] = []

    def product(self, x: mx.array, layer: ZigzagLinear) -> mx.array:
        """layer's y for x, one row or a few; computes those of the other layers as well."""
        if x is not self._x or id(layer) not in self._outputs:
            outputs = self._products(x) if x.size == x.shape[-1] else self._rows(x)
            if len(outputs) == 1:
                return outputs[0]
            self._x = x
            self._outputs = {id(one): y for one, y in zip(self.layers, outputs, strict=True)}
        y = self._outputs.pop(id(layer))
        if not self._outputs:
            self._x = None
        return y

    def _prepared(self, prepare: Callable[[Sequence[Any]], Any]) -> Any:
        """The step that `prepare` makes of the layers as they are now."""
        if self._step is None or any(layer["weight"] is not weight for layer, weight in self._weights):
            self._arrange()
            self._step = prepare(self.layers)
            self._weights = [(layer, layer["weight"]) for layer in self.layers]
            self._skips = self.skips
        return self._step

    def _arrange(self) -> None:
        select.arrange(self.layers)

    def _products(self, x: mx.array) -> list[mx.array]:
        step: interface.Step = self._prepared(select.prepare)
        counter = active_counts.current() if self._skips else None
        tally = None if counter is None else counter.tally(self._alone, x.size // x.shape[-1])
        if tally is None:
            return step(x, None)[0]
        outputs, counted = step(x, tally.running[0])
        tally.keep([counted])
        return outputs

    def _rows(self, x: mx.array) -> list[mx.array]:
        if x.size > (most := select.MOST_ROWS) * x.shape[-1]:  # (sequences, 1, inputs)
            parts = [self._rows(x[at : at + most]) for at in range(0, x.shape[0], most)]
            return [mx.concatenate(list(of_layer)) for of_layer in zip(*parts, strict=True)]
        if _fits_a_step(x):
            return self._products(x)
        outputs, active = select.sparse_rows(x, self.layers)
        if counter := active_counts.current():
            for layer, counts in zip(self.layers, active, strict=True):
                if layer.threshold is not None:
                    counter.count_rows(layer, counts)
        return outputs


def _fits_a_step(x: mx.array) -> bool:
    """Whether the backend's prepared steps take so many rows."""
    return x.size <= select.backend().fused_rows * x.shape[-1]


def share_input(layers: list[Any]) -> SharedInput:
    """Let these layers of one kind, which read one input, run in one launch."""
    shared = layers[0]._shared(layers)
    for layer in layers:
        layer.shared_input = shared
    return shared


def share_inputs(model: nn.Module) -> None:
    """Let q/k/v and gate/up of each module run in one launch."""
    for module in model.modules():
        for names in SHARED_INPUTS:
            named = [base(module.get(name)) for name in names]
            layers = [layer for layer in named if isinstance(layer, ZigzagLayer)]
            if len(layers) > 1 and len({(type(layer), layer.inputs) for layer in layers}) == 1:
                share_input(layers)


def is_adapter(module: Any) -> bool:
    """Whether a module is one of mlx-lm's adapters around a linear layer."""
    return isinstance(module, nn.Module) and ADAPTED in module and "lora_a" in module


def base(module: Any) -> Any:
    """The layer that an adapter was put around, and any other module itself."""
    return module[ADAPTED] if is_adapter(module) else module


def zigzag_layers(model: nn.Module) -> dict[str, ZigzagLayer]:
    """Path -> layer, for every Zigzag layer of a model that may skip channels, experts too.

    Paths are those of config.json: of an adapter's base that of the adapter.
    """
    modules = dict(model.named_modules())
    within = {f"{path}.{ADAPTED}" for path, module in modules.items() if is_adapter(module)}
    return {
        path: layer
        for path, module in modules.items()
        if path not in within and isinstance(layer := base(module), ZigzagLayer) and not layer.always_dense
    }


def linear_layers(model: nn.Module) -> dict[str, ZigzagLinear]:
    """Those of `zigzag_layers` that are one matrix each."""
    return {path: one for path, one in zigzag_layers(model).items() if isinstance(one, ZigzagLinear)}


def put_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put layers in the place of those that have these paths; adapters stay around them."""
    modules = dict(model.named_modules())
    places = {path: f"{path}.{ADAPTED}" if is_adapter(modules[path]) else path for path in layers}
    model.update_modules(tree_unflatten([(places[path], layer) for path, layer in layers.items()]))
