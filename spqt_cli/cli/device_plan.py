"""What several devices would hold and read of a converted model, and tokens/s at most: a calculation.

Which part of each matrix a device gets is asked of mlx-lm's own code, `shard` or `pipeline`, with a group of
processes that are not there. Time is that of reading weights and of the messages of a token; nothing else is
counted, and nothing is measured.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx import nn
from mlx.nn.layers import distributed
from mlx.utils import tree_flatten

from spqt_cli.bench import chips
from spqt_cli.cli import describe
from spqt_cli.convert import parameters
from spqt_cli.decode import parallel
from spqt_cli.errors import SpqtError, UsageError
from spqt_cli.format import config_json, locate
from spqt_cli.format.folder import Folder

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
MOST_DEVICES = 1024
ACTIVATION_BYTES = 2  # of a number that devices send one another


@dataclass(frozen=True)
class Devices:
    """count: equal devices. gb_per_s: of the memory of one; link_gb_per_s, latency_us: of a message."""

    count: int
    gb_per_s: float
    link_gb_per_s: float
    latency_us: float


@dataclass(frozen=True)
class Way:
    """A way to divide the model. Bytes are those of the device that has most; ms a token.

    stored: of weights; read: of them by a token that skips nothing, sparse_read: at the plan's sparsity. One
    device after another works in a pipeline, so its milliseconds are those of all. messages: that a token
    waits for, one after another. reason: why there is no such way, else "".
    """

    name: str
    devices: int
    stored_bytes: float = 0.0
    read_bytes: float = 0.0
    sparse_read_bytes: float = 0.0
    messages: int = 0
    message_ms: float = 0.0
    read_ms: float = 0.0
    sparse_read_ms: float = 0.0
    reason: str = ""

    @property
    def rates(self) -> tuple[float, float]:
        """Tokens per second at most: nothing skipped, and sparse; 0 where the way is not possible."""
        if self.reason:
            return 0.0, 0.0
        return 1e3 / (self.read_ms + self.message_ms), 1e3 / (self.sparse_read_ms + self.message_ms)


@dataclass(frozen=True)
class Plan:
    """sparsity: fraction of channels skipped, and `origin` where that number is from."""

    folder: Path
    devices: Devices
    sparsity: float
    origin: str
    ways: list[Way]

    def document(self) -> dict[str, Any]:
        """For JSON."""
        ways = [
            vars(way) | dict(zip(("tokens_per_second", "sparse_tokens_per_second"), way.rates, strict=True))
            for way in self.ways
        ]
        return {
            "calculated": True, "folder": str(self.folder), **vars(self.devices),
            "sparsity": self.sparsity, "origin": self.origin, "ways": ways,
        }  # fmt: skip

    def text(self) -> str:
        """For people."""
        one = self.devices
        lines = [
            f"{self.folder}: a calculation of reading and sending alone, nothing was measured; memory "
            f"{one.gb_per_s:g} GB/s, link {one.link_gb_per_s:g} GB/s, {one.latency_us:g} us a message; "
            f"sparse: {self.sparsity:.0%} ({self.origin})",
            f"{'':24} {'weights':>10} {'MB a token':>12} {'sparse':>9} {'messages':>9} {'tok/s at most':>14} "
            f"{'sparse':>8}",
        ]
        for way in self.ways:
            if way.reason:
                lines.append(f"{way.name:24} not possible: {way.reason}")
                continue
            dense, sparse = way.rates
            lines.append(
                f"{way.name:24} {way.stored_bytes / 1e9:7.2f} GB {way.read_bytes / 1e6:12.1f} "
                f"{way.sparse_read_bytes / 1e6:9.1f} {way.messages:9} {dense:14.1f} {sparse:8.1f}"
            )
        lines.append(
            "weights and MB a token are of one device, the one that has most of them; no cache is counted"
        )
        return "\n".join(lines)


class _Absent:
    """A group of processes that are not there, for code that asks who this one is."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def bandwidth(text: str) -> float:
    """GB/s of a number or of a chip's name. Raises UsageError for anything else."""
    known = {name.lower().replace(" ", ""): value for name, value in chips.GB_PER_S.items()}
    if (found := known.get(text.lower().replace(" ", ""))) is not None:
        return found
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UsageError(f"--bandwidth {text!r}", f"GB/s, or a chip: {', '.join(chips.GB_PER_S)}")
    return value


def plan(path: str, revision: str | None, devices: Devices) -> Plan:
    """The plan for a converted folder or hub id. Raises UsageError for numbers out of range."""
    if not 2 <= devices.count <= MOST_DEVICES:
        raise UsageError(f"--plan {devices.count}: 2 to {MOST_DEVICES} devices are possible", "--plan 2")
    for flag, value in (("--link", devices.link_gb_per_s), ("--latency", devices.latency_us)):
        if not 0 < value < math.inf:
            raise UsageError(f"{flag} {value:g} is out of range", "a number above 0")
    folder = locate.open_folder(path, revision)
    account = Account(folder, devices)
    ways = [account.way("one device", 1, account.everything())]
    for name, divided in (("tensor parallel", account.tensor), ("pipeline", account.pipeline)):
        try:
            ways.append(divided(f"{name}, {devices.count} devices"))
        except SpqtError as error:
            ways.append(Way(f"{name}, {devices.count} devices", devices.count, reason=error.cause))
    return Plan(folder.path, devices, account.sparsity, account.origin, ways)


class Account:
    """One folder's tensors, and what a part of them amounts to."""

    def __init__(self, folder: Folder, devices: Devices) -> None:
        self.folder, self.devices = folder, devices
        model = self._built()
        self.pieces, _ = describe.pieces(folder, model)
        self.sparsity, self.origin = describe.sparsity_of(folder, model)
        self.hidden = config_json.size(folder.config, "hidden_size") or 0

    def _built(self) -> nn.Module:
        return parameters.build(self.folder.config, str(self.folder))

    def everything(self) -> dict[str, float]:
        """Path -> 1.0, for every module."""
        return {piece.path: 1.0 for piece in self.pieces}

    def tensor(self, name: str) -> Way:
        """Of each matrix that mlx-lm divides, the first process's part."""
        model, count = self._built(), self.devices.count
        before = _sizes(model)
        with parallel.sharding(None, _Absent(0, count)):
            parallel.prepare(model, self.folder.config)
        shard: Any = model.shard
        shard(_Absent(0, count))
        after = _sizes(model)
        shares = {path: after.get(path, 0) / size for path, size in before.items() if size}
        sums = sum(
            isinstance(one, distributed.ShardedToAllLinear) or _adds_up(one) for one in model.modules()
        )
        steps = 2 * (count - 1)  # of a ring that adds up: a part goes round, and the sum
        return self.way(name, count, shares, messages=sums * steps, message_bytes=self._vector() / count)

    def pipeline(self, name: str) -> Way:
        """Some of the layers on each device; each waits for the one before it."""
        count, found = self.devices.count, []
        for rank in range(count):
            model: Any = self._built()
            with parallel.sharding(_Absent(rank, count), None):
                parallel.prepare(model, self.folder.config)
            model.model.pipeline(_Absent(rank, count))
            there = range(model.model.start_idx, model.model.end_idx)
            shares = {piece.path: float(_is_in(piece.path, there)) for piece in self.pieces}
            found.append(self.way(name, count, shares))
        whole = self.way(name, 1, self.everything())
        most = max(found, key=lambda way: way.stored_bytes)
        messages = 2 * (count - 1)  # from each to the next, and the last result to all
        return replace(
            most,
            read_ms=whole.read_ms,  # one after another
            sparse_read_ms=whole.sparse_read_ms,
            messages=messages,
            message_ms=messages * self._message_ms(self._vector()),
        )

    def way(
        self,
        name: str,
        count: int,
        shares: Mapping[str, float],
        messages: int = 0,
        message_bytes: float = 0.0,
    ) -> Way:
        """A way whose fullest device has these shares of the modules, by path."""
        stored = read = sparse = 0.0
        for piece in self.pieces:
            share = shares.get(piece.path, 1.0)
            stored += share * piece.nbytes
            read += share * piece.read
            sparse += share * piece.read * (1 if piece.reason else 1 - self.sparsity)
        per_ms, message_ms = self.devices.gb_per_s * 1e6, messages * self._message_ms(message_bytes)
        return Way(name, count, stored, read, sparse, messages, message_ms, read / per_ms, sparse / per_ms)

    def _vector(self) -> float:
        """Bytes of one token's hidden state."""
        return self.hidden * ACTIVATION_BYTES

    def _message_ms(self, size: float) -> float:
        return self.devices.latency_us / 1e3 + size / (self.devices.link_gb_per_s * 1e6)


def _sizes(model: nn.Module) -> dict[str, int]:
    """Path -> numbers in the module's own arrays."""
    found: dict[str, int] = {}
    for name, array in dict(tree_flatten(model.parameters())).items():
        path = name.rpartition(".")[0]
        found[path] = found.get(path, 0) + array.size
    return found


def _adds_up(module: nn.Module) -> bool:
    """Whether a mixture's module was told to add results up over devices."""
    return getattr(module, "sharding_group", None) is not None


def _is_in(path: str, layers: range) -> bool:
    """Whether a device with these layers has a module: one of its layers, or one that all devices have."""
    numbered = _LAYER.search(path)
    return numbered is None or int(numbered[1]) in layers
