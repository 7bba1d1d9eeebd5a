"""bitsandbytes of 4 bits: numbers of a table of 16 (nf4, fp4), one largest number for each block of 64 or so.

The blocks run over the flattened weight. With nested quantization the largest numbers are themselves bytes
into a table of 256, scaled by blocks of 256, with one offset for all.
"""

import json
from typing import Any

import mlx.core as mx

from spqt_cli.convert.unpack import codes, scaled
from spqt_cli.convert.unpack.packed import Arrays, Packed, Source
from spqt_cli.errors import AGAIN, SpqtError, UnsupportedError

STATE = ".quant_state.bitsandbytes__"
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


def find(source: Source) -> list[Packed]:
    """Every weight of 4 bits with its state beside it, and of int8 with its rows' largest number."""
    states = [name for name in source.tensors if STATE in name]
    return [*(_weight(source, *name.split(STATE, 1)) for name in sorted(states)), *scaled.find(source)]


def _weight(source: Source, name: str, kind: str) -> Packed:
    state = _state(source, name, kind)
    shape, size = tuple(state["shape"]), state["blocksize"]
    count = shape[0] * shape[1]
    blocks, nested = -(-count // size), "nested_blocksize" in state
    source.need(name, ("U8",), (-(-count // 2), 1))
    source.need(f"{name}.absmax", ("U8",) if nested else ("F32",), (blocks,))
    source.need(f"{name}.quant_map", ("F32",), (16,))
    leaves = ["absmax", "quant_map"]
    if nested:
        outer = -(-blocks // state["nested_blocksize"])
        source.need(f"{name}.nested_absmax", ("F32",), (outer,))
        source.need(f"{name}.nested_quant_map", ("F32",), (256,))
        leaves += ["nested_absmax", "nested_quant_map"]
    dtype = DTYPES[state["dtype"]]

    def read(arrays: Arrays) -> mx.array:
        table, largest = arrays[f"{name}.quant_map"], arrays[f"{name}.absmax"]
        if nested:
            wide = mx.repeat(arrays[f"{name}.nested_absmax"], state["nested_blocksize"])[:blocks]
            largest = arrays[f"{name}.nested_quant_map"][largest] * wide + state["nested_offset"]

        def piece(stored: mx.array, first: int, last: int) -> mx.array:  # of blocks
            some = stored[first * size // 2 : last * size // 2]
            pairs = mx.stack([some >> 4, some & 15], axis=-1).reshape(-1)  # the first in the high half
            factors = mx.repeat(largest[first:last], size)[: pairs.size]
            return (table[pairs] * factors).astype(dtype)

        return codes.by_rows(arrays[name].reshape(-1), (blocks, size), piece)[:count].reshape(shape)

    stored = (name, f"{name}{STATE}{kind}", *(f"{name}.{leaf}" for leaf in leaves))
    return Packed(name, stored, read)


def _state(source: Source, name: str, kind: str) -> dict[str, Any]:
    """The JSON that stands beside a packed weight."""
    stored = f"{name}{STATE}{kind}"
    source.need(stored, ("U8",))
    text = source.value(stored).tobytes()
    if not any(text):
        raise UnsupportedError(
            f"{source.where}: the headers don't tell the shapes of weights that bitsandbytes packed",
            "download the model, then name its folder",
        )
    try:
        state = json.loads(text)
    except (ValueError, RecursionError):
        state = None
    wanted = {"shape": list, "blocksize": int, "dtype": str}
    if isinstance(state, dict) and "nested_blocksize" in state:
        wanted |= {"nested_blocksize": int, "nested_offset": float}
    if not isinstance(state, dict) or not all(type(state.get(key)) is kind for key, kind in wanted.items()):
        raise SpqtError(f"{source.where}: tensor {stored} is no quantization state", AGAIN)
    numbers = [*state["shape"], state["blocksize"], state.get("nested_blocksize", 2)]
    if len(state["shape"]) != 2 or not all(type(n) is int and 0 < n < 1 << 31 for n in numbers):
        raise SpqtError(f"{source.where}: tensor {stored} has sizes that can't be", AGAIN)
    if state["dtype"] not in DTYPES or state["blocksize"] % 2:
        raise SpqtError(f"{source.where}: tensor {stored} has a dtype or a block that can't be", AGAIN)
    return state
