"""Metadata of one architecture in a .gguf file: typed access that remembers which keys were used.

A key that nobody asked for and that is not known to leave the results alone is refused by name.
"""

from pathlib import Path
from typing import Any

import numpy as np

from spqt_cli.convert.gguf.file import Header
from spqt_cli.errors import AGAIN, SpqtError, UnsupportedError

LARGEST_SIZE = 1 << 31

# Whole families that describe a file's making, its author, or how it was cut; none reaches the model.
HARMLESS_FAMILIES = ("general.", "quantize.", "split.", "mradermacher.")
# Keys of an architecture that only repeat or describe.
HARMLESS = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout")
# Keys of an architecture that change nothing as long as they hold this value.
NEUTRAL: dict[str, Any] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 1.0,
    "pooling_type": 0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "use_parallel_residual": False,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
}


class Metadata:
    """The keys `ARCH.*` of a header, read by their last part."""

    def __init__(self, header: Header, arch: str) -> None:
        self.path: Path = header.path
        self.arch = arch
        self.header = header
        self._used: set[str] = set()

    def size(self, key: str, default: int | None = None) -> int:
        """A length or count of at least 1; an array counts as one number if all its entries agree."""
        value = self._value(key, default)
        if isinstance(value, np.ndarray) and value.size and np.all(value == value[0]):
            value = value[0].item()
        if type(value) is not int or not 1 <= value < LARGEST_SIZE:
            raise self._unfit(key, value, "a size")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number, in the shortest decimal form that the stored float32 has."""
        value = self._value(key, default)
        if type(value) not in (int, float) or not np.isfinite(value):
            raise self._unfit(key, value, "a number")
        return float(str(np.float32(value)))

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._unfit(key, value, "a string")
        return value

    def raw(self, key: str) -> Any:
        """A value as it stands, or None; the caller judges it."""
        self._used.add(key)
        return self.header.metadata.get(f"{self.arch}.{key}")

    def refuse_unused(self, other: tuple[str, ...]) -> None:
        """Refuse any key that nobody used; `other`: prefixes that someone else answers for."""
        unused = []
        for key, value in self.header.metadata.items():
            part = key.removeprefix(f"{self.arch}.")
            own = part != key
            if own and (part in self._used or part in HARMLESS):
                continue
            if (
                own
                and part in NEUTRAL
                and not isinstance(value, list | np.ndarray)
                and value == NEUTRAL[part]
            ):
                continue
            if not own and key.startswith(HARMLESS_FAMILIES + other):
                continue
            unused.append(f"{key} = {_short(value)}")
        if unused:
            raise UnsupportedError(
                f"{self.path} has metadata that spqt does not know: {', '.join(sorted(unused)[:10])}",
                "they may change the model's results, so they are not skipped",
            )

    def _value(self, key: str, default: Any) -> Any:
        self._used.add(key)
        value = self.header.metadata.get(f"{self.arch}.{key}", default)
        if value is None:
            raise SpqtError(f"{self.path} lacks {self.arch}.{key}", AGAIN)
        return value

    def _unfit(self, key: str, value: Any, wanted: str) -> SpqtError:
        return SpqtError(f"{self.path}: {self.arch}.{key} is {_short(value)}, not {wanted}", AGAIN)


def _short(value: Any) -> str:
    if isinstance(value, list | np.ndarray):
        return f"{len(value)} entries"
    return repr(value)[:40]
