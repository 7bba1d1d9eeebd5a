"""Packed weights of compressed-tensors (`weight_packed`), and NVFP4 of compressed-tensors and modelopt.

pack-quantized: integers of 1 to 8 bits in int32 words, a row's as one stream of bits, stored with half
their range added. NVFP4: pairs of E2M1 numbers in bytes, an E4M3 scale for 16 of them, and one scale for
all, by which compressed-tensors divides and modelopt multiplies. MXFP4: an E8M0 scale for 32.
"""

import mlx.core as mx

from spqt_cli.convert.unpack import codes, scaled
from spqt_cli.convert.unpack.packed import Arrays, Packed, Source
from spqt_cli.errors import UnsupportedError
from spqt_cli.format.checkpoint_files import Tensor

FLOATS = ("F16", "BF16", "F32")
NV_GROUP, MX_GROUP = 16, 32


def find(source: Source) -> list[Packed]:
    """Every weight that is packed or has scales."""
    found = []
    for path in source.named(".weight_packed"):
        packed = source.need(f"{path}.weight_packed", ("I32", "U8"))
        if len(packed.shape) != 2:
            raise source.unfit(f"{path}.weight_packed", f"is {packed.shape}, not a matrix")
        found.append(
            _integers(source, path) if packed.dtype == "I32" else _floats(source, path, "weight_packed")
        )
    for path in source.named(".weight_scale_2"):
        if source.tensors.get(f"{path}.weight", Tensor("", (), "")).dtype == "U8":
            found.append(_floats(source, path, "weight"))
    return [*found, *scaled.find(source)]


def _integers(source: Source, path: str) -> Packed:
    packed = source.tensors[f"{path}.weight_packed"]
    scales = source.need(f"{path}.weight_scale", FLOATS)
    outputs, words = packed.shape
    bits, inputs = _size(source, path, words)
    if words != -(-inputs * bits // 32):
        raise UnsupportedError(
            f"{source.where}: tensor {path}.weight_packed is packed with gaps, which spqt can't unpack",
            "convert the original model",
        )
    groups = scales.shape[1] if len(scales.shape) == 2 else 1
    if scales.shape not in ((outputs, groups), (1,)) or not groups or inputs % groups:
        raise source.unfit(f"{path}.weight_scale", f"is {scales.shape}, its weight {(outputs, inputs)}")
    zero, order = f"{path}.weight_zero_point", f"{path}.weight_g_idx"
    if zero in source.tensors:
        source.need(zero, ("I32",), (-(-outputs * bits // 32), groups))
    if order in source.tensors:
        source.need(order, ("I32", "I64"), (inputs,))
    dtype = source.rounded(scales)

    def read(arrays: Arrays) -> mx.array:
        wide = mx.broadcast_to(arrays[f"{path}.weight_scale"].reshape(-1, groups), (outputs, groups))
        zeros: mx.array | None = None
        if zero in arrays:
            zeros = codes.unpack(arrays[zero].T, bits, outputs).T.astype(mx.float32)

        def piece(stored: mx.array, first: int, last: int) -> mx.array:
            integers = codes.unpack(stored[first:last], bits, inputs)
            offset = 1 << (bits - 1) if zeros is None else zeros[first:last]
            return codes.widen(integers, wide[first:last], offset, dtype, arrays.get(order))

        return codes.by_rows(arrays[f"{path}.weight_packed"], (outputs, inputs), piece)

    leaves = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    return Packed(f"{path}.weight", tuple(n for x in leaves if (n := f"{path}.{x}") in source.tensors), read)


def _size(source: Source, path: str, words: int) -> tuple[int, int]:
    """(bits, inputs) of a packed weight: its shape is stored, its bits stand in the config."""
    widths = sorted(_widths(source))
    source.need(f"{path}.weight_shape", ("I64", "I32"), (2,))
    inputs = int(source.value(f"{path}.weight_shape")[1])
    if inputs == 0 and len(widths) == 1:  # only the headers are here
        return widths[0], words * 32 // widths[0]
    fits = [bits for bits in widths if words in (-(-inputs * bits // 32), -(-inputs // (32 // bits)))]
    if inputs <= 0 or not fits:
        raise source.unfit(f"{path}.weight_shape", f"says {inputs} inputs, its weight has {words} words")
    return fits[0], inputs


def _widths(source: Source) -> set[int]:
    groups = source.settings.get("config_groups")
    groups = groups.values() if isinstance(groups, dict) else ()
    weights = [one.get("weights") for one in groups if isinstance(one, dict)]
    bits = {one.get("num_bits") for one in weights if isinstance(one, dict)}
    return {n for n in bits if type(n) is int and 1 <= n <= 8} or {4, 8}


def _floats(source: Source, path: str, leaf: str) -> Packed:
    packed = source.tensors[f"{path}.{leaf}"]
    scales = source.need(f"{path}.weight_scale", ("F8_E4M3", "U8", "F8_E8M0"))
    whole = {"weight": f"{path}.weight_scale_2"}.get(leaf, f"{path}.weight_global_scale")
    is_nv = scales.dtype == "F8_E4M3"
    outputs, inputs = packed.shape[0], packed.shape[1] * 2
    size = NV_GROUP if is_nv else MX_GROUP
    if scales.shape != (outputs, inputs // size) or inputs % size:
        raise source.unfit(f"{path}.weight_scale", f"is {scales.shape}, its weight {(outputs, inputs)}")
    if is_nv and source.need(whole, ("F32",)).shape not in ((), (1,)):
        raise source.unfit(whole, "is not one number")

    def read(arrays: Arrays) -> mx.array:
        small = arrays[f"{path}.weight_scale"]
        factors = mx.from_fp8(small, mx.float32) if is_nv else codes.exponents(small)
        if is_nv:
            one = arrays[whole].reshape(1, 1)
            factors = factors * one if leaf == "weight" else factors / one

        def piece(stored: mx.array, first: int, last: int) -> mx.array:
            values = codes.fp4(stored[first:last]).reshape(last - first, -1, size)
            return (values * factors[first:last, :, None]).astype(source.dtype).reshape(last - first, inputs)

        return codes.by_rows(arrays[f"{path}.{leaf}"], (outputs, inputs), piece)

    stored = [f"{path}.{leaf}", f"{path}.weight_scale", *([whole] if is_nv else [])]
    return Packed(f"{path}.weight", tuple(stored), read)
