"""GPTQ and AWQ: integers of 2, 3, 4 or 8 bits in int32 words, groups along the inputs.

GPTQ (AutoGPTQ, gptqmodel) packs consecutive inputs into a word and zero points of consecutive outputs;
its first format stores each zero point less one. AWQ packs eight outputs into a word in the order
0 2 4 6 1 3 5 7, zero points likewise.
"""

import mlx.core as mx

from spqt_cli.convert.unpack import codes
from spqt_cli.convert.unpack.packed import Arrays, Packed, Source
from spqt_cli.errors import UnsupportedError

WIDTHS = (2, 3, 4, 8)
FLOATS = ("F16", "BF16", "F32")
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word of AWQ's each output lies


def find_gptq(source: Source) -> list[Packed]:
    """Every weight of a GPTQ checkpoint."""
    form = source.settings.get("checkpoint_format") or source.settings.get("format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise _unsupported(source, f"GPTQ in the form {form!r}")
    return [_gptq(source, path, 0 if form == "gptq_v2" else 1) for path in source.named(".qweight")]


def _gptq(source: Source, path: str, missing: int) -> Packed:
    """missing: what a stored zero point lacks."""
    weight = source.need(f"{path}.qweight", ("I32",))
    scales = source.need(f"{path}.scales", FLOATS)
    if len(weight.shape) != 2 or len(scales.shape) != 2 or scales.shape[1] != weight.shape[1]:
        raise source.unfit(f"{path}.scales", f"is {scales.shape}, its weight {weight.shape}")
    words, outputs = weight.shape
    order = source.tensors.get(f"{path}.g_idx")
    bits = source.settings.get("bits")
    if order is not None:  # true for each layer, while the config knows one width for all
        source.need(f"{path}.g_idx", ("I32", "I64"), (*order.shape[:1],))
        bits = words * 32 // max(order.shape[0], 1)
    if bits not in WIDTHS:
        raise _unsupported(source, f"GPTQ of {bits} bits")
    inputs = words * 32 // bits
    if order is not None and order.shape[0] != inputs:
        raise source.unfit(f"{path}.g_idx", f"is {order.shape}, its weight has {inputs} inputs")
    if order is None and inputs % scales.shape[0]:
        raise source.unfit(f"{path}.scales", f"is {scales.shape}, its weight has {inputs} inputs")
    source.need(f"{path}.qzeros", ("I32",), (scales.shape[0], -(-outputs * bits // 32)))
    dtype = source.rounded(scales)

    def read(arrays: Arrays) -> mx.array:
        wide = arrays[f"{path}.scales"].T
        zeros = _zeros(arrays[f"{path}.qzeros"], bits, missing, outputs).T.astype(mx.float32)
        index = None if order is None else arrays[f"{path}.g_idx"]
        if index is not None:  # older files count groups from the end
            index = mx.where(index < 0, index + wide.shape[1], index)

        def piece(stored: mx.array, first: int, last: int) -> mx.array:
            integers = codes.unpack(stored[:, first:last].T, bits, inputs)
            return codes.widen(integers, wide[first:last], zeros[first:last], dtype, index)

        return codes.by_rows(arrays[f"{path}.qweight"], (outputs, inputs), piece)

    leaves = ("qweight", "qzeros", "scales", "g_idx")
    return Packed(f"{path}.weight", _present(source, path, leaves), read)


def _zeros(words: mx.array, bits: int, missing: int, outputs: int) -> mx.array:
    """uint8 (groups, outputs). gptqmodel adds one to all numbers of a word at once, with carries."""
    if missing and 8 % bits == 0:
        words = words.view(mx.uint32) + mx.array(sum(1 << at for at in range(0, 32, bits)), mx.uint32)
        return codes.unpack(words, bits, outputs)
    return (codes.unpack(words, bits, outputs) + missing) & ((1 << bits) - 1)


def find_awq(source: Source) -> list[Packed]:
    """Every weight of an AWQ checkpoint in the `gemm` order."""
    form, bits = source.settings.get("version", "gemm"), source.settings.get("bits", 4)
    if str(form).lower() != "gemm" or bits != 4:
        raise _unsupported(source, f"AWQ of the kind {form!r} and {bits} bits")
    return [_awq(source, path) for path in source.named(".qweight")]


def _awq(source: Source, path: str) -> Packed:
    weight = source.need(f"{path}.qweight", ("I32",))
    scales = source.need(f"{path}.scales", FLOATS)
    inputs, words = weight.shape if len(weight.shape) == 2 else (0, 0)
    groups = scales.shape[0] if scales.shape == (scales.shape[0], words * 8) else 0
    if not groups or inputs % groups:
        raise source.unfit(f"{path}.scales", f"is {scales.shape}, its weight {weight.shape}")
    has_zeros = f"{path}.qzeros" in source.tensors
    if has_zeros:
        source.need(f"{path}.qzeros", ("I32",), (groups, words))
    dtype = source.rounded(scales)

    def read(arrays: Arrays) -> mx.array:
        wide = arrays[f"{path}.scales"].T
        zeros = _in_order(arrays[f"{path}.qzeros"]).T.astype(mx.float32) if has_zeros else 8

        def piece(stored: mx.array, first: int, last: int) -> mx.array:
            integers = _in_order(stored[:, first // 8 : last // 8]).T
            offset = zeros if isinstance(zeros, int) else zeros[first:last]
            return codes.widen(integers, wide[first:last], offset, dtype)

        return codes.by_rows(arrays[f"{path}.qweight"], (words * 8, inputs), piece, 8)

    return Packed(f"{path}.weight", _present(source, path, ("qweight", "qzeros", "scales")), read)


def _in_order(words: mx.array) -> mx.array:
    """uint8 (rows, 8 n) of AWQ's words (rows, n)."""
    integers = codes.unpack(words, 4, words.shape[1] * 8).reshape(*words.shape, 8)
    return mx.take(integers, mx.array(ORDER), axis=-1).reshape(words.shape[0], -1)


def _present(source: Source, path: str, leaves: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for leaf in leaves if (name := f"{path}.{leaf}") in source.tensors)


def _unsupported(source: Source, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{source.where} is quantized by {what}, which spqt can't unpack", "convert the original model"
    )
