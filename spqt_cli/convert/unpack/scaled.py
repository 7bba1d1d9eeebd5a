"""Numbers of 8 bits with scales: E4M3 of DeepSeek, Qwen, MiniMax, Mistral, fbgemm, modelopt and
compressed-tensors, int8 of compressed-tensors and bitsandbytes.

A weight is its stored number times its scale, also where the scale is called `scale_inv`. There is one
scale for all, for each output, for each expert, or for each block of outputs and inputs.
"""

import mlx.core as mx

from spqt_cli.convert.unpack import codes
from spqt_cli.convert.unpack.packed import Arrays, Packed, Source
from spqt_cli.format.checkpoint_files import Tensor

BYTES = ("F8_E4M3", "I8")
SCALES = ("F32", "BF16", "F16", "U8", "F8_E8M0")
BLOCK = (128, 128)  # where a config says nothing: DeepSeek's
EXPONENTS = ("U8", "F8_E8M0")


def scale_of(source: Source, name: str) -> str | None:
    """The name of a stored tensor's scales, None where it has none."""
    names = [f"{name}_scale_inv", f"{name}_scale", f"{name.removesuffix('weight')}SCB"]
    return next((found for found in names if found in source.tensors), None)


def find(source: Source) -> list[Packed]:
    """Every weight of 8 bits that has scales."""
    found = []
    for name, tensor in sorted(source.tensors.items()):
        scale = scale_of(source, name) if tensor.dtype in BYTES else None
        if scale is not None:
            found.append(_weight(source, name, tensor, scale))
    return found


def _weight(source: Source, name: str, tensor: Tensor, scale: str) -> Packed:
    scales = source.need(scale, SCALES)
    blocks = _blocks(source, tensor.shape, scale, scales.shape)
    zero = f"{name}_zero_point"
    has_zero = zero in source.tensors and tensor.dtype == "I8"
    if has_zero:
        source.need(zero, ("I8",), scales.shape)
    largest = scale.endswith("SCB")  # the largest number of each row, not its scale
    dtype = source.rounded(scales)

    def read(arrays: Arrays) -> mx.array:
        factors = arrays[scale]
        factors = codes.exponents(factors) if scales.dtype in EXPONENTS else factors.astype(mx.float32)
        factors = _as_blocks(factors / 127 if largest else factors, tensor.shape)
        zeros = _as_blocks(arrays[zero].astype(mx.float32), tensor.shape) if has_zero else None
        rows, columns = _flat(tensor.shape)

        def piece(stored: mx.array, first: int, last: int) -> mx.array:
            part, is_float = stored[first:last], tensor.dtype == "F8_E4M3"
            wide = mx.from_fp8(part, mx.float32) if is_float else part.astype(mx.float32)
            if zeros is not None:
                wide = wide - _spread(zeros, blocks, first, last, columns)
            return (wide * _spread(factors, blocks, first, last, columns)).astype(dtype)

        stored = arrays[name].reshape(rows, columns)
        return codes.by_rows(stored, (rows, columns), piece, blocks[0]).reshape(tensor.shape)

    stored = (name, scale, *((zero,) if has_zero else ()))
    return Packed(name, stored, read)


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a tensor of any number of dimensions."""
    columns = shape[-1] if shape else 1
    rows = 1
    for length in shape[:-1]:
        rows *= length
    return rows, columns


def _as_blocks(factors: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Scales (row blocks, column blocks) of a weight of this shape, its leading axes flattened."""
    if factors.ndim == 1 and factors.size > 1:  # one for each output
        return factors[:, None]
    if factors.ndim < 2:
        return factors.reshape(1, 1)
    if factors.ndim > 2 and factors.shape[-2:] == (1, 1):  # one for each expert
        return mx.repeat(factors.reshape(-1, 1), shape[-2], axis=0)
    return factors.reshape(-1, factors.shape[-1])


def _blocks(source: Source, shape: tuple[int, ...], name: str, scales: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of the flattened weight that share a scale."""
    rows, columns = _flat(shape)
    size = 1
    for length in scales:
        size *= length
    if size == 1:
        return 1, columns
    if scales in ((rows,), (rows, 1), (*shape[:-1], 1)):
        return 1, columns
    if len(shape) == 3 and scales == (shape[0], 1, 1):
        return 1, columns
    if len(scales) == len(shape) and scales[:-2] == shape[:-2]:
        for block in _sizes(source, shape, scales):
            exact = len(shape) == 2 or shape[-2] % block[0] == 0  # blocks don't reach into the next expert
            if exact and tuple(-(-n // b) for n, b in zip(shape[-2:], block, strict=True)) == scales[-2:]:
                return block
    raise source.unfit(name, f"is {scales}, its weight {shape}: they don't belong together")


def _sizes(source: Source, shape: tuple[int, ...], scales: tuple[int, ...]) -> list[tuple[int, int]]:
    """Sizes of a block in question: as the config says, DeepSeek's, and what divides the weight."""
    asked = [source.settings.get("weight_block_size")]
    groups = source.settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        asked.append(weights.get("block_structure") if isinstance(weights, dict) else None)
    found = [
        (one[0], one[1])
        for one in asked
        if isinstance(one, list) and len(one) == 2 and all(type(n) is int and n > 0 for n in one)
    ]
    found.append(BLOCK)
    if all(count and not length % count for length, count in zip(shape[-2:], scales[-2:], strict=True)):
        found.append((shape[-2] // scales[-2], shape[-1] // scales[-1]))
    return found


def _spread(factors: mx.array, blocks: tuple[int, int], first: int, last: int, columns: int) -> mx.array:
    """The scales of rows first to last, of as many columns as they take to broadcast."""
    height, width = blocks
    rows = factors
    if rows.shape[0] > 1:
        rows = mx.repeat(rows[first // height : -(-last // height)], height, axis=0)[: last - first]
    return rows if rows.shape[1] == 1 else mx.repeat(rows, width, axis=1)[:, :columns]
