"""Per-layer choices for one device: skip channels, run Zigzag densely, or go back to row-grouped weights.

`spqt bench --kernel --write` measures and stores them; `apply` follows them in a loaded model. A profile
belongs to one chip, backend, MLX and spqt version, and lies in the user's cache folder. It knows layers,
shapes and densities; it measures nothing.
"""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx import nn

from spqt_cli.backends import select
from spqt_cli.decode import recognize, relayout
from spqt_cli.decode.layers import SHARED_INPUTS, ZigzagLinear, linear_layers, zigzag_layers
from spqt_cli.errors import UsageError
from spqt_cli.format import thresholds
from spqt_cli.system import files
from spqt_cli.version import __version__

FORMAT = 1
SPARSE, ZIGZAG, ROWS = "sparse", "zigzag", "row-grouped"


@dataclass(frozen=True)
class Choice:
    """For one unit: sparse pays below this density (0 never, 1 always); otherwise zigzag or row-grouped."""

    sparse_below: float
    otherwise: str

    def at(self, density: float) -> str:
        """SPARSE, ZIGZAG or ROWS for a unit with that density."""
        return SPARSE if density < self.sparse_below else self.otherwise


class Size(NamedTuple):
    """What a choice depends on, of a layer that is not there yet."""

    outputs: int
    inputs: int
    bits: int
    group_size: int


@dataclass
class Unit:
    """Layers that run in one launch, because they read one input, or one layer alone.

    layers: by path; a Size each while a conversion is planned. stays: it is part of a block that runs fused
    in few launches; taken out of them it would cost the block's other launches more than it gains.
    """

    layers: dict[str, Any]
    stays: bool = False

    @property
    def name(self) -> str:
        return "+".join(path.rpartition(".")[2] for path in self.layers)

    @property
    def shape(self) -> str:
        return "+".join(f"{one.outputs}x{one.inputs}" for one in self.layers.values())

    @property
    def key(self) -> str:
        """What a measurement holds for: shapes, bits and group size."""
        first = next(iter(self.layers.values()))
        return f"{self.shape} {first.bits} bits group {first.group_size}"


def units(model: nn.Module) -> list[Unit]:
    """The units of a model, in the order of its modules; every Zigzag layer but experts is in exactly one."""
    return grouped(linear_layers(model), traced_blocks(model))


def traced_blocks(model: nn.Module) -> list[str]:
    """The paths of what runs fused of blocks, or will when loaded; none where that saves no launches."""
    return list(recognize.formed(model)) if select.backend().traces else []


def grouped(layers: Mapping[str, Any], staying: Iterable[str] = ()) -> list[Unit]:
    """Layers by path, each with its sizes, as units. staying: paths of blocks whose units stay."""
    beginnings = tuple(f"{path}." for path in staying)
    by_parent: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        by_parent.setdefault(parent, {})[leaf] = layer
    found: list[Unit] = []
    for parent, own in by_parent.items():
        prefix = f"{parent}." if parent else ""
        for names in SHARED_INPUTS:
            together = {name: own[name] for name in names if name in own}
            if len(together) > 1 and len({layer.inputs for layer in together.values()}) == 1:
                found.append(Unit({prefix + name: own.pop(name) for name in together}))
        found += [Unit({prefix + name: layer}) for name, layer in own.items()]
    for unit in found:
        unit.stays = any(path.startswith(beginnings) for path in unit.layers)
    return found


def chip() -> str:
    """The name of MLX's default device."""
    info = mx.device_info()
    return str(info.get("device_name") or info.get("architecture") or mx.default_device())


def device_key() -> dict[str, str]:
    """What a profile belongs to."""
    return {
        "chip": chip(),
        "backend": select.backend().name,
        "mlx": metadata.version("mlx"),
        "spqt": __version__,
    }


def path() -> Path:
    """Where this device's profile lies, whether there is one or not."""
    slug = "-".join(
        "".join(c if c.isalnum() or c == "." else "_" for c in part) for part in device_key().values()
    )
    return files.cache_folder() / f"profile-{slug}.json"


def write(choices: dict[str, Choice], origin: dict[str, Any]) -> Path:
    """Add choices by unit key to this device's profile, replacing the file in one step.

    origin: where they come from. Earlier choices of other units stay.
    """
    target = path()
    merged, _ = read()
    merged = {**merged, **choices}
    document = {
        "format": FORMAT,
        "device": device_key(),
        "origin": origin,
        "units": {
            key: {"sparse_below": c.sparse_below, "otherwise": c.otherwise} for key, c in merged.items()
        },
    }
    with files.disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".profile-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(document, file, indent=1)
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            raise
    return target


def read() -> tuple[dict[str, Choice], str]:
    """(this device's choices by unit key, what is wrong with the file if anything is).

    No file gives no choices. A damaged one too, but says so: it is only a cache.
    """
    target = path()
    try:
        document = json.loads(target.read_text(encoding="utf-8"))
        if document["format"] != FORMAT or document["device"] != device_key():
            raise ValueError("it belongs to another device or version")
        return {key: _choice(entry) for key, entry in document["units"].items()}, ""
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"profile {target} ignored ({error}); measure again: spqt bench --kernel --write"


def _choice(entry: dict[str, Any]) -> Choice:
    below, otherwise = float(entry["sparse_below"]), entry["otherwise"]
    if not 0 <= below <= 1 or otherwise not in (ZIGZAG, ROWS):
        raise ValueError("a choice in it makes no sense")
    return Choice(below, otherwise)


Curves = Mapping[str, Sequence[float] | None]  # path of a layer -> its stored curve


def follow(model: nn.Module, curves: Curves, sparsity: float | None) -> str:
    """Make each layer of a model run the way this device's profile says.

    sparsity: what layers without a curve are taken to skip. Returns a line on what was chosen,
    with the seconds and the error that repacking cost; "" without a profile for these layers. Call it once,
    after the thresholds are set.
    """
    choices, fault = read()
    if not choices:
        return fault
    densities = {id(layer): density for layer, density in expected_densities(model, curves, sparsity)}
    counts = dict.fromkeys((SPARSE, ZIGZAG, ROWS), 0)
    repack: dict[str, ZigzagLinear] = {}
    for unit in units(model):
        choice = choices.get(unit.key)
        if choice is None:
            continue
        density = unit_density(unit, [densities[id(layer)] for layer in unit.layers.values()])
        chosen = way(choice, unit, density)
        counts[chosen] += len(unit.layers)
        if chosen == ROWS:
            repack.update(unit.layers)
        elif chosen == ZIGZAG:
            for layer in unit.layers.values():
                layer.set_threshold(None)
    cost = relayout.to_rows(model, repack) if repack else ""
    head = _repack_head(model, choices)
    if not any(counts.values()) and not head:
        return ""
    parts = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"profile of this device: {parts or 'no'} layers{cost}{head}"


def _repack_head(model: nn.Module, choices: dict[str, Choice]) -> str:
    """Put the head into the Zigzag layout if that is this device's choice; says what it cost."""
    head = relayout.find_head(model)
    choice = choices.get(head.key) if head is not None else None
    if head is None or choice is None or choice.otherwise != ZIGZAG:
        return ""
    start = time.perf_counter()
    error = relayout.head_to_zigzag(model, head)
    return f"; head in Zigzag, {time.perf_counter() - start:.1f} s, relative error {error:.1%}"


def way(choice: Choice, unit: Unit, density: float) -> str:
    """SPARSE, ZIGZAG or ROWS: how a unit runs on the device of `choice`, `density` of its channels active.

    SPARSE, which changes nothing, for a unit that stays; ZIGZAG for ROWS where MLX can't hold its layers.
    """
    if unit.stays:
        return SPARSE
    chosen = choice.at(density)
    return ZIGZAG if chosen == ROWS and not all(map(relayout.fits_rows, unit.layers.values())) else chosen


def better_as_rows(layers: Mapping[str, Size], density: float, staying: Iterable[str] = ()) -> list[str]:
    """Paths of the layers that this device runs faster row-grouped at this density.

    staying: as in `grouped`. Raises UsageError without a profile.
    """
    choices, fault = read()
    if not choices:
        raise UsageError(fault or "this device has no profile", "make one: spqt bench --kernel --write")
    known = [unit for unit in grouped(layers, staying) if unit.key in choices]
    rows = [unit for unit in known if way(choices[unit.key], unit, density) == ROWS]
    return [name for unit in rows for name in unit.layers]


def unit_density(unit: Unit, densities: Sequence[float]) -> float:
    """The fraction of a unit's weights that is read, from the density of each layer."""
    sizes = [layer.outputs for layer in unit.layers.values()]
    return sum(size * density for size, density in zip(sizes, densities, strict=True)) / sum(sizes)


def stored_curves(model: nn.Module) -> Curves:
    """The curves that the layers of a model were loaded with."""
    return {path: layer.__dict__.get("curve") for path, layer in zigzag_layers(model).items()}


def expected_densities(
    model: nn.Module, curves: Curves, sparsity: float | None
) -> list[tuple[ZigzagLinear, float]]:
    """Each Zigzag layer that is in a unit, with the density that its threshold leaves, by its curve.

    sparsity: what a layer with a threshold and no curve is taken to skip.
    """
    result = []
    for unit in units(model):
        for name, layer in unit.layers.items():
            curve = curves.get(name)
            if layer.threshold is None:
                skipped = 0.0
            elif curve and layer.threshold.size == 1:
                skipped = float(np.interp(np.array(layer.threshold)[0], curve, thresholds.CURVE_SPARSITIES))
            else:
                skipped = sparsity or 0.0
            result.append((layer, 1 - skipped))
    return result
