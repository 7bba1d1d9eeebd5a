"""One weight and the stored tensors that stand for it, with what readers share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from spqt_cli.errors import AGAIN, SpqtError
from spqt_cli.format.checkpoint_files import Tensor

Arrays = Mapping[str, mx.array]


@dataclass(frozen=True)
class Packed:
    """A weight that is stored otherwise.

    name: of the weight, as an unquantized checkpoint has it. stored: names of all tensors that this
    weight uses up. read: from all stored tensors, lazy, the weight, lazy.
    """

    name: str
    stored: tuple[str, ...]
    read: Callable[[Arrays], mx.array]


@dataclass
class Source:
    """What readers look at: where (for messages), the quantization's settings, headers by name.

    value: a small stored tensor's content as a NumPy array. dtype: of weights whose scales have not 16 bits.
    """

    where: str
    settings: dict[str, Any]
    tensors: Mapping[str, Tensor]
    value: Callable[[str], Any]
    dtype: mx.Dtype = mx.bfloat16

    def named(self, suffix: str) -> list[str]:
        """What precedes `suffix` in the names that end so, in order."""
        return sorted(name.removesuffix(suffix) for name in self.tensors if name.endswith(suffix))

    def need(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None = None) -> Tensor:
        """A tensor that must be there, of one of these dtypes and, if given, of this shape."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise SpqtError(f"{self.where}: tensor {name} is missing", AGAIN)
        if tensor.dtype not in dtypes:
            raise self.unfit(name, f"is {tensor.dtype}, not {' or '.join(dtypes)}")
        if shape is not None and tensor.shape != shape:
            raise self.unfit(name, f"is {tensor.shape}, its weight needs {shape}")
        return tensor

    def unfit(self, name: str, what: str) -> SpqtError:
        return SpqtError(f"{self.where}: tensor {name} {what}", AGAIN)

    def rounded(self, scales: Tensor) -> mx.Dtype:
        """The dtype of a weight: its scales', where those have 16 bits."""
        return {"F16": mx.float16, "BF16": mx.bfloat16}.get(scales.dtype, self.dtype)
