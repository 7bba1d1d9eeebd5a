"""Writes the fixtures beside it: tiny weights packed by the publishing libraries, and their own unpacking.

Run by hand, never by the tests, with Python 3.11 and on the CPU:
torch 2.13.0, gptqmodel 7.7.0, autoawq 0.2.9, compressed-tensors 0.20.1, bitsandbytes 0.50.2.

In each file a case's tensors are called CASE.<name as stored>, what its library makes of them CASE.expected;
the metadata holds, per case, the quantization_config that such a checkpoint has. modelopt's NVFP4 is
written from its definition, fp4 x block scale x tensor scale, since the library needs a GPU.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
INPUTS, OUTPUTS, GROUP = 64, 32, 32


def weight(outputs: int = OUTPUTS, inputs: int = INPUTS) -> torch.Tensor:
    return torch.randn(outputs, inputs) * 0.05


def linear() -> torch.nn.Linear:
    made = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
    made.weight.data = weight()
    return made


def ranges(
    w: torch.Tensor, bits: int, symmetric: bool, group: int = GROUP
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points (outputs, groups) of weights (outputs, inputs) in their order."""
    groups = w.reshape(w.shape[0], -1, group)
    most = 2**bits - 1
    if symmetric:
        scales = groups.abs().amax(-1) * 2 / most
        return scales, torch.full_like(scales, 2 ** (bits - 1))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = (high - low) / most
    return scales, torch.round(-low / scales)


class File:
    """Tensors and configs of one fixture."""

    def __init__(self, name: str) -> None:
        self.name, self.tensors, self.configs = name, {}, {}

    def add(self, case: str, config: dict, stored: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
        self.configs[case] = json.dumps(config)
        for name, tensor in (stored | {"expected": expected}).items():
            self.tensors[f"{case}.{name}"] = tensor.detach().clone().contiguous()

    def write(self) -> None:
        save_file(self.tensors, str(HERE / f"{self.name}.safetensors"), metadata=self.configs)


def gptq() -> None:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    file = File("gptq")
    for bits in (2, 3, 4, 8):
        for symmetric, act, version in ((True, False, 1), (False, True, 1), (False, False, 2)):
            source = linear()
            scales, zeros = ranges(source.weight.data, bits, symmetric)
            if version == 1:  # which stores zero points less one
                zeros = zeros.clamp(min=1)
            index = torch.arange(INPUTS) // GROUP
            if act:
                index = index[torch.randperm(INPUTS)]
            packed = TorchLinear(bits, GROUP, symmetric, act, INPUTS, OUTPUTS, bias=False)
            packed.pack_original(source, scales, zeros, index.to(torch.int32))
            packed.post_init()
            expected = packed.dequantize_weight().T
            if version == 1:
                config = QuantizeConfig(bits=bits, group_size=GROUP)
                convert_gptq_v2_to_v1_format_module(packed, config)
            stored = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
            settings = {
                "quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": symmetric, "desc_act": act,
                "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
            }  # fmt: skip
            file.add(f"b{bits}_{'act' if act else 'plain'}_v{version}", settings, stored, expected)
    file.write()


def awq() -> None:
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    file = File("awq")
    source = linear()
    scales, zeros = ranges(source.weight.data, 4, False)
    scales = scales.half().float()
    packed = WQLinear_GEMM.from_linear(source, 4, GROUP, False, scales.T.contiguous(), zeros.T.contiguous())
    stored = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales")}
    expected = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, GROUP).T
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    file.add("gemm", config, stored, expected)
    file.write()


def compressed_tensors() -> None:
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    file = File("compressed_tensors")

    def case(name: str, form: str, args: dict, state: dict[str, torch.Tensor]) -> None:
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
        kind = BaseCompressor.get_value_from_registry(form)
        stored = kind.compress(state, scheme)
        expected = kind.decompress(dict(stored), scheme)["weight"]
        group = {"targets": ["Linear"], "weights": scheme.weights.model_dump(mode="json")}
        config = {
            "quant_method": "compressed-tensors", "format": form, "version": "0.20.1",
            "config_groups": {"group_0": group},
        }  # fmt: skip
        file.add(name, config, stored, expected)

    def integer(
        name: str, bits: int, symmetric: bool, per_channel: bool = False, inputs: int = INPUTS
    ) -> None:
        w = weight(inputs=inputs)
        scales, zeros = ranges(w, bits, symmetric, inputs if per_channel else GROUP)
        state = {"weight": w.bfloat16(), "weight_scale": scales.bfloat16()}
        if not symmetric:
            state["weight_zero_point"] = (zeros - 2 ** (bits - 1)).to(torch.int8)
        strategy = {"strategy": "channel"} if per_channel else {"strategy": "group", "group_size": GROUP}
        case(
            name,
            "pack-quantized",
            {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy},
            state,
        )

    for bits in (3, 4, 8):
        integer(f"w{bits}_symmetric", bits, True)
        integer(f"w{bits}_asymmetric", bits, False)
    integer("w4_channel", 4, True, per_channel=True)
    integer("w4_ragged", 4, True, per_channel=True, inputs=60)  # no whole number of words

    for name, form, bits, kind in (
        ("fp8", "float-quantized", 8, "float"),
        ("int8", "int-quantized", 8, "int"),
    ):
        w, most = weight(), 448.0 if kind == "float" else 127.0
        base = {"num_bits": bits, "type": kind, "symmetric": True}
        channel = (w.abs().amax(1, keepdim=True) / most).bfloat16()
        case(f"{name}_channel", form, base | {"strategy": "channel"},
             {"weight": w.bfloat16(), "weight_scale": channel})  # fmt: skip
        case(f"{name}_tensor", form, base | {"strategy": "tensor"},
             {"weight": w.bfloat16(), "weight_scale": channel.amax().reshape(1)})  # fmt: skip
    w = weight(40, 72)  # no multiple of the block
    padded = torch.zeros(48, 96)
    padded[:40, :72] = w
    blocks = padded.reshape(3, 16, 3, 32).abs().amax((1, 3)) / 448
    case("fp8_block", "float-quantized",
         {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block",
          "block_structure": [16, 32]},
         {"weight": w.bfloat16(), "weight_scale": blocks.bfloat16()})  # fmt: skip

    w = weight()
    for name, form, size, args in (
        ("nvfp4", "nvfp4-pack-quantized", 16, {"strategy": "tensor_group", "group_size": 16}),
        ("mxfp4", "mxfp4-pack-quantized", 32, {"strategy": "group", "group_size": 32}),
    ):
        largest = w.reshape(OUTPUTS, -1, size).abs().amax(-1)
        state = {"weight": w.bfloat16()}
        if name == "nvfp4":
            whole = (448 * 6 / w.abs().amax()).reshape(1)
            state |= {"weight_scale": (largest / 6 * whole).to(torch.float8_e4m3fn).float()}
            state |= {"weight_global_scale": whole}
        else:
            state |= {"weight_scale": 2.0 ** torch.floor(torch.log2(largest / 4))}
        case(name, form, {"num_bits": 4, "type": "float", "symmetric": True, **args}, state)
    w = weight()
    scales = 2.0 ** torch.ceil(torch.log2(w.reshape(OUTPUTS, -1, 32).abs().amax(-1) / 448))
    case("mxfp8", "mxfp8-quantized",
         {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32,
          "scale_dtype": "uint8"},
         {"weight": w.bfloat16(), "weight_scale": scales.bfloat16()})  # fmt: skip
    file.write()


def modelopt() -> None:
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8

    file = File("modelopt")
    codes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])[torch.randint(0, 8, (OUTPUTS, INPUTS))]
    codes *= torch.randint(0, 2, codes.shape) * 2 - 1
    scales = (torch.rand(OUTPUTS, INPUTS // 16) * 400 + 1).to(torch.float8_e4m3fn)
    whole = torch.tensor(3e-5)
    stored = {"weight": pack_fp4_to_uint8(codes), "weight_scale": scales, "weight_scale_2": whole,
              "input_scale": torch.tensor(0.01)}  # fmt: skip
    expected = (codes.reshape(OUTPUTS, -1, 16) * (scales.float() * whole)[..., None]).reshape(OUTPUTS, INPUTS)
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    file.add("nvfp4", config, stored, expected)
    file.write()


def bitsandbytes() -> None:
    import bitsandbytes as library
    from bitsandbytes import functional

    file = File("bitsandbytes")
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            # 33 blocks of 64: the last byte of nothing, one block beyond a multiple of 32
            w = weight(33, 64).bfloat16()
            packed, state = functional.quantize_4bit(
                w, blocksize=64, quant_type=kind, compress_statistics=nested
            )
            stored = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
            config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind,
                      "bnb_4bit_use_double_quant": nested}  # fmt: skip
            expected = functional.dequantize_4bit(packed, state)
            file.add(f"{kind}{'_nested' if nested else ''}", config, stored, expected)
    layer = library.nn.Linear8bitLt(INPUTS, OUTPUTS, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": weight().half()}, strict=False)
    stored = layer.to("cpu").state_dict()
    expected = functional.int8_vectorwise_dequant(stored["weight"], stored["SCB"])
    file.add("int8", {"quant_method": "bitsandbytes", "load_in_8bit": True}, stored, expected)
    file.write()


if __name__ == "__main__":
    for make in (gptq, awq, compressed_tensors, modelopt, bitsandbytes):
        if len(sys.argv) < 2 or make.__name__ in sys.argv[1:]:
            torch.manual_seed(0)
            make()
