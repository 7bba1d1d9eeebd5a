"""Counts the instructions per weight of the kernel in the PTX that NVIDIA's own compiler makes.

    python -m benchmarks.instructions                        # libnvrtc and headers beside MLX or PyTorch
    python -m benchmarks.instructions --ptx-folder ptx       # keeps the PTX

NVRTC gets the text that MLX gives it, with CUDA's half headers in place of MLX's larger ones. Works from a
bare checkout; needs no GPU, only the library. tests/metal/count_instructions.py says what is counted.
"""

import argparse
import ctypes
import site
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.machine import from_bare_tree

from_bare_tree()
from tests.metal import count_instructions as counting

HEADERS = "#include <cuda_fp16.h>\n#include <cuda_bf16.h>\ntypedef unsigned int uint32_t;"
SYSTEM = [Path("/usr/local/cuda"), Path("/usr/lib/x86_64-linux-gnu"), Path("/usr")]


def package_folders() -> Iterator[Path]:
    """Where Python packages lie: NVIDIA's wheels, MLX's and PyTorch's bring libraries and headers."""
    for folder in dict.fromkeys([*sys.path, *site.getsitepackages(), site.getusersitepackages()]):
        if folder and Path(folder).is_dir():
            yield Path(folder)


def library() -> ctypes.CDLL:
    """libnvrtc, the newest that is found."""
    patterns = ("nvidia/*/lib/libnvrtc.so*", "torch/lib/libnvrtc*.so*", "mlx*/lib/libnvrtc.so*")
    found = [path for folder in package_folders() for one in patterns for path in folder.glob(one)]
    found += [
        path for root in SYSTEM for path in (*root.glob("libnvrtc.so*"), *root.glob("lib64/libnvrtc.so*"))
    ]
    usable = [path for path in found if "builtins" not in path.name and ".alt." not in path.name]
    for path in sorted(usable, key=lambda one: one.name, reverse=True):
        try:
            for builtins in path.parent.glob("libnvrtc-builtins*.so*"):  # NVRTC looks for it by name alone
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            loaded = ctypes.CDLL(str(path))
        except OSError:
            continue
        print(f"NVRTC: {path}", file=sys.stderr)
        return loaded
    raise SystemExit("no libnvrtc found: install MLX for CUDA, PyTorch, or CUDA itself")


def include_folders() -> list[str]:
    """Folders with CUDA's headers, and with those that they include."""
    roots = [one for folder in package_folders() for one in (*folder.glob("nvidia/*"), folder / "mlx")]
    folders = [root / "include" for root in (*roots, *SYSTEM)]
    folders += [folder / "cccl" for folder in folders]
    return [str(folder) for folder in folders if folder.is_dir() and str(folder) != "/usr/include"]


def ptx(nvrtc: ctypes.CDLL, text: str, options: Sequence[str]) -> str:
    """The PTX of a CUDA text; ends the program with the compiler's words where it refuses."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
    given = (ctypes.c_char_p * len(options))(*(one.encode() for one in options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), given)
    sizes, read = (
        (nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        if failed
        else (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    )
    sizes(program, ctypes.byref(size))
    answer = ctypes.create_string_buffer(size.value + 1)
    read(program, answer)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    words = answer.value.decode(errors="replace")
    if failed:
        raise SystemExit(f"NVRTC refused the kernel:\n{words[:4000]}")
    return words


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.instructions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4, 8])
    parser.add_argument("--architecture", default="compute_90")
    parser.add_argument("--ptx-folder", type=Path, help="keep the PTX here")
    arguments = parser.parse_args()
    nvrtc = library()
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    options = [f"--gpu-architecture={arguments.architecture}", "--device-as-default-execution-space"]
    options += [f"--include-path={folder}" for folder in include_folders()]
    print(
        f"NVRTC {major.value}.{minor.value}, {arguments.architecture}, float16, group 64\n\n{counting.head()}"
    )
    for bits in arguments.bits:
        for decode, name in counting.DECODES.items():
            made = ptx(nvrtc, counting.cuda_text(*counting.cuda_problem(bits, decode), HEADERS), options)
            print(counting.row(f"{bits} bits, {name}", counting.ptx_counts(made)), flush=True)
            if arguments.ptx_folder:
                arguments.ptx_folder.mkdir(parents=True, exist_ok=True)
                (arguments.ptx_folder / f"{bits}-bits-decode-{decode}.ptx").write_text(made)


if __name__ == "__main__":
    main()
