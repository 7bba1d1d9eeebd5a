"""By what a source is quantized, whether spqt can unpack it, and which stored tensors stand for what.

A form that spqt does not know is refused by its name (exit 4), before any weight is downloaded where
config.json tells; tensors that don't fit one another are damage (exit 3).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from spqt_cli.convert.unpack import bitsandbytes, compressed, gptq
from spqt_cli.convert.unpack.packed import Packed, Source
from spqt_cli.errors import UnsupportedError
from spqt_cli.format import checkpoint_files
from spqt_cli.format.checkpoint_files import Tensor

ORIGINAL = "convert the original model"
MLX = "MLX"
READERS: dict[str, Callable[[Source], list[Packed]]] = {
    "gptq": gptq.find_gptq,
    "awq": gptq.find_awq,
    "bitsandbytes": bitsandbytes.find,
    "compressed-tensors": compressed.find,
    "modelopt": compressed.find,
    "fp8": compressed.find,
    "fbgemm_fp8": compressed.find,
    "mxfp8": compressed.find,
    "mxfp4": compressed.find,
}
# Published in 8 bits, often with no better original; or kept as it is: no --allow-requantize is asked for.
NATIVE = ("fp8", "fbgemm_fp8", "mxfp8", "mxfp4")
FORMATS = (  # of compressed-tensors
    "pack-quantized", "float-quantized", "int-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision",
)  # fmt: skip
ALGORITHMS = ("FP8", "NVFP4", "MIXED_PRECISION")  # of modelopt
FLOAT_FORMATS = ("float-quantized", "mxfp8-quantized", "naive-quantized")
KEEPS_MXFP4 = ("gpt_oss",)  # model types whose class takes `_blocks` and `_scales`
# Of activations, caches and formats: nothing that a weight's value depends on.
USELESS = (
    ".input_scale", ".activation_scale", ".input_global_scale", ".input_zero_point", ".output_scale",
    ".k_scale", ".v_scale", ".q_scale", ".weight_format",
)  # fmt: skip
PACKED = (
    ".qweight",
    ".qzeros",
    ".g_idx",
    ".weight_packed",
    ".weight_shape",
    ".absmax",
    ".SCB",
    ".W_q",
    ".bitmask",
)


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of its quantization, wherever it stands; empty where it says nothing."""
    inner = config.get("text_config")
    for place in (config, inner if isinstance(inner, dict) else {}):
        for key in ("quantization", "quantization_config", "compression_config"):
            if place.get(key):
                found = place[key]
                if not isinstance(found, dict):
                    return {"quant_method": f"{key} {found!r:.40}"}
                return {**found, "quant_method": MLX} if key == "quantization" else found
    return {}


def beside(folder: Path) -> dict[str, Any]:
    """What files beside config.json say: modelopt's, and AutoGPTQ's and AutoAWQ's of old."""
    for name, method in (("hf_quant_config.json", "modelopt"), ("quantize_config.json", "gptq")):
        if (folder / name).is_file():
            return {"quant_method": method, **checkpoint_files.read_json(folder / name)}
    return {}


def named(found: dict[str, Any]) -> str | None:
    """The method that settings name, None for no settings."""
    if not found:
        return None
    method = found.get("quant_method")
    if isinstance(method, str):
        return method if method == MLX else method.lower().replace("_", "-").replace("fbgemm-", "fbgemm_")
    if "config_groups" in found:
        return "compressed-tensors"
    if "quant_algo" in found:
        return "modelopt"
    if found.get("load_in_4bit") or found.get("load_in_8bit"):
        return "bitsandbytes"
    return MLX if "group_size" in found and "bits" in found else "a method that its config does not name"


def is_native(found: dict[str, Any]) -> bool:
    """True for weights of 8 bits with scales and for mxfp4 experts, which ask for no flag."""
    method = named(found)
    if method == "modelopt":
        return _algorithm(found) == "FP8"
    if method != "compressed-tensors":
        return method in NATIVE
    groups = found.get("config_groups")
    groups = groups.values() if isinstance(groups, dict) else ()
    weights = [one.get("weights") for one in groups if isinstance(one, dict)]
    floats = all(isinstance(w, dict) and (w.get("type"), w.get("num_bits")) == ("float", 8) for w in weights)
    return found.get("format") in FLOAT_FORMATS and floats


def _algorithm(found: dict[str, Any]) -> Any:
    """modelopt's; its own file nests the settings, config.json does not."""
    inner = found.get("quantization")
    return (inner if isinstance(inner, dict) else found).get("quant_algo")


def check(found: dict[str, Any], where: str) -> None:
    """Refuse a method that spqt has no reader for, by its name."""
    method = named(found)
    if method is not None and method != MLX and method not in READERS:
        raise unsupported(where, method)
    if method == "modelopt" and _algorithm(found) not in ALGORITHMS:
        raise unsupported(where, f"modelopt's {_algorithm(found)!r:.40}")
    if method == "compressed-tensors":
        form, transform = found.get("format"), found.get("transform_config")
        if form not in FORMATS:
            raise unsupported(where, f"compressed-tensors in the form {form!r:.40}")
        if isinstance(transform, dict) and transform.get("config_groups"):
            raise unsupported(where, "compressed-tensors with transforms of the activations")


def unsupported(where: str, method: str) -> UnsupportedError:
    return UnsupportedError(f"{where} is quantized by {method}, which spqt can't unpack", ORIGINAL)


def is_packed(tensors: Mapping[str, Tensor]) -> bool:
    """True if tensors are packed, whatever a config says."""
    return any(name.endswith((*PACKED, ".scales")) for name in tensors)


def find(source: Source, model_type: str) -> tuple[list[Packed], set[str]]:
    """The packed weights of a checkpoint, and the stored tensors that have no use.

    Raises UnsupportedError for packed tensors that nothing explains, SpqtError for ones that don't fit.
    """
    method = named(source.settings)
    if method == MLX:
        return [], set()
    if method is None and is_packed(source.tensors):
        raise unsupported(source.where, "a method that its config does not name")
    found = READERS[method or "fp8"](source)
    used = {name for one in found for name in one.stored}
    useless = {name for name in source.tensors if method and name.endswith(USELESS)} - used
    _refuse_unexplained(source, set(source.tensors) - used - useless, model_type)
    if both := {one.name for one in found} & (set(source.tensors) - used):
        raise source.unfit(min(both), "is stored both packed and plain")
    return found, useless


def _refuse_unexplained(source: Source, left: set[str], model_type: str) -> None:
    method = named(source.settings) or "a method that its config does not name"
    for name in sorted(left):
        tensor = source.tensors[name]
        integers = name.endswith(".weight") and tensor.dtype in ("U8", "I8", "I32")
        if name.endswith(PACKED) or (integers and not _explained(source, name)):
            raise unsupported(source.where, f"{method} in a form of its own (tensor {name})")
        if name.endswith("_blocks") and tensor.dtype == "U8" and model_type not in KEEPS_MXFP4:
            raise unsupported(source.where, f"mxfp4 experts of the architecture {model_type!r}")
        if tensor.dtype in checkpoint_files.EIGHT_BITS and not _explained(source, name):
            raise UnsupportedError(
                f"{source.where}: tensor {name} has dtype {tensor.dtype} and no scale explains it",
                "use a checkpoint in bf16, fp16 or fp32",
            )


def _explained(source: Source, name: str) -> bool:
    """True for 8-bit floats that mlx-lm's own class reads: `x.weight` with `x.scale` (DeepSeek V4)."""
    stem = name.removesuffix(".weight").removesuffix(".scale")
    return f"{stem}.weight" in source.tensors and f"{stem}.scale" in source.tensors


def read_value(folder: Path, tensors: Mapping[str, Tensor]) -> Callable[[str], Any]:
    """A reader of small stored tensors as NumPy arrays."""
    from safetensors import safe_open

    def value(name: str) -> Any:
        with safe_open(folder / tensors[name].shard, framework="np") as shard:
            return shard.get_tensor(name)

    return value


def dtype_of(config: dict[str, Any]) -> mx.Dtype:
    """What a config says that its weights are computed in; bfloat16 where it says nothing."""
    inner = config.get("text_config")
    for place in (config, inner if isinstance(inner, dict) else {}):
        found = place.get("torch_dtype") or place.get("dtype")
        if found in ("float16", "bfloat16", "float32"):
            return {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}[found]
    return mx.bfloat16
