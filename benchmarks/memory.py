"""Peak memory of `spqt convert`, `calibrate` and `fit` on synthetic models of several depths and one width.

    python -m benchmarks.memory convert [--hidden 4352] [--layers 2 4 8 16] [--folder DIR] [--keep]
    python -m benchmarks.memory calibrate [--hidden 1024] [--layers 4 16] [--method M] [--folder DIR]
    python -m benchmarks.memory fit [--hidden 768] [--layers 2 16] [--method gptq|full] [--folder DIR]

Each run is a process of its own; the figure is that process's peak resident set size. The rule of `convert`:
at most 300 MiB + 3 x the largest tensor, and less than 5 % growth from the first to the last number of
layers. `calibrate` runs once block by block (`--stream`) and once with the model in memory. Its rule: block
by block, the peak grows by less than a quarter of what the weights grow by. `fit` is given 40 texts, so that
no source writes any. Its rule: at most 1 GB + 4 x the largest block. The last line of stdout is one JSON
document; the exit code is 1 if the rule is broken.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import machine

BASE_BYTES = 300 << 20
CHILD = "import sys; from benchmarks import memory; getattr(memory, sys.argv[1])(*sys.argv[2:])"
TOKENS, WINDOW = 256, 64  # of a calibration
FIT_BYTES, FIT_TEXTS, FIT_STEPS = 10**9, 40, 3  # beside four blocks; of 512 tokens; of training
ROWS_AT_ONCE = 1024  # of a synthetic tensor, so that writing it takes little memory


def shapes(hidden: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Tensor -> shape of a llama of that width: grouped-query heads, 3.5 x wide MLP, untied head."""
    wide, small, vocabulary = hidden * 7 // 2, hidden // 4, hidden * 8
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name, outputs in (("q_proj", hidden), ("k_proj", small), ("v_proj", small), ("o_proj", hidden)):
            found[f"{layer}.self_attn.{name}.weight"] = (outputs, hidden)
        found[f"{layer}.mlp.gate_proj.weight"] = found[f"{layer}.mlp.up_proj.weight"] = (wide, hidden)
        found[f"{layer}.mlp.down_proj.weight"] = (hidden, wide)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}.{name}.weight"] = (hidden,)
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def config(hidden: int, layers: int) -> dict[str, object]:
    """config.json of that llama."""
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden,
        "intermediate_size": hidden * 7 // 2, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256, "head_dim": 64, "rms_norm_eps": 1e-5, "vocab_size": hidden * 8,
        "rope_theta": 10000.0, "max_position_embeddings": 2048, "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }  # fmt: skip


def write_checkpoint(folder: Path, hidden: int, layers: int) -> int:
    """Write random float16 weights, the same rows over and over, with a minimal tokenizer; their bytes."""
    from tokenizers import Tokenizer, models

    folder.mkdir(parents=True)
    header, end = {}, 0
    for name, shape in shapes(hidden, layers).items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    blocks: dict[int, np.ndarray] = {}  # width -> rows
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes(hidden, layers).values():
            rows, width = (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])
            if width not in blocks:
                block = rng.standard_normal((ROWS_AT_ONCE, width), dtype=np.float32)
                blocks[width] = (block * 0.02).astype(np.float16)
            for start in range(0, rows, ROWS_AT_ONCE):
                file.write(blocks[width][: rows - start].tobytes())
    (folder / "config.json").write_text(json.dumps(config(hidden, layers)))
    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(folder / "tokenizer.json"))
    return end


def convert_here(source: str, output: str) -> None:
    """Convert, and print the peak resident set size in bytes and the seconds taken."""
    from spqt_cli.convert import convert

    start = time.perf_counter()
    convert.convert(source, Path(output), convert.ConvertOptions())
    print(json.dumps({"peak_bytes": peak_bytes(), "seconds": time.perf_counter() - start}))


def peak_bytes() -> int:
    """The peak resident set size of this process.

    Linux hands ru_maxrss of the parent on to a child, so there the kernel's own mark is read.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def convert_row(folder: Path, hidden: int, layers: int, keep: bool) -> dict[str, object]:
    """One row: convert a synthetic checkpoint in its own process."""
    source, output = folder / f"llama-{hidden}-{layers}", folder / f"converted-{hidden}-{layers}"
    size = write_checkpoint(source, hidden, layers)
    row = in_process("convert_here", source, output)
    largest = max(2 * int(np.prod(shape)) for shape in shapes(hidden, layers).values())
    row |= {"layers": layers, "source_bytes": size, "largest_tensor_bytes": largest}
    row["limit_bytes"] = BASE_BYTES + 3 * largest
    if not keep:
        shutil.rmtree(source)
        shutil.rmtree(output)
    print(
        f"{layers:>3} layers, {size / 1e9:6.2f} GB, largest tensor {largest / 1e6:7.1f} MB: peak "
        f"{row['peak_bytes'] / 1e6:7.1f} MB of at most {row['limit_bytes'] / 1e6:7.1f} MB, "
        f"{row['seconds']:.1f} s",
        file=sys.stderr,
    )
    return row


def in_process(function: str, *arguments: object) -> dict[str, object]:
    """What a function of this module prints, run in a process of its own."""
    command = [sys.executable, "-c", CHILD, function, *map(str, arguments)]
    done = subprocess.run(command, cwd=machine.ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def calibrate_here(folder: str, text: str, stream: str, method: str) -> None:
    """Calibrate, and print the peak resident set size in bytes, the seconds and the sparsity reached."""
    from spqt_cli.calibrate import calibrate

    start = time.perf_counter()
    options = calibrate.CalibrateOptions(
        sparsity=0.4,
        data=Path(text),
        tokens=TOKENS,
        window=WINDOW,
        method=method,
        stream=stream == "stream",
    )
    result = calibrate.calibrate(Path(folder), options, lambda *_: None)
    seconds = time.perf_counter() - start
    print(json.dumps({"peak_bytes": peak_bytes(), "seconds": seconds, "realised": result.realised}))


def calibrate_row(folder: Path, hidden: int, layers: int, method: str) -> dict[str, object]:
    """One row: a synthetic model, converted, then calibrated both ways."""
    from spqt_cli.calibrate.stream import blocks
    from spqt_cli.convert import convert

    source, model = folder / f"llama-{hidden}-{layers}", folder / f"converted-{hidden}-{layers}"
    write_checkpoint(source, hidden, layers)
    convert.convert(str(source), model, convert.ConvertOptions(), lambda *_: None)
    text = folder / "text.txt"
    text.write_text("a" * (TOKENS + WINDOW))
    row: dict[str, object] = {"layers": layers, "weight_bytes": blocks.weights_bytes(model)}
    for way in ("stream", "whole"):
        row[way] = in_process("calibrate_here", model, text, way, method)
        print(f"{layers:>3} layers, {way}: {row[way]}", file=sys.stderr)
    return row


def fit_here(source: str, output: str, text: str, method: str) -> None:
    """Fit, and print the peak resident set size in bytes and the seconds taken."""
    from spqt_cli.convert import convert
    from spqt_cli.fit import fit
    from spqt_cli.fit.options import FitOptions

    start = time.perf_counter()
    options = FitOptions(method, own=0, data=Path(text), steps=FIT_STEPS if method == "full" else None)
    fit.convert_fitted(source, Path(output), convert.ConvertOptions(), options, lambda *_: None)
    print(json.dumps({"peak_bytes": peak_bytes(), "seconds": time.perf_counter() - start}))


def fit_row(folder: Path, hidden: int, layers: int, method: str) -> dict[str, object]:
    """One row: a synthetic checkpoint, converted and fitted in its own process."""
    source, text = folder / f"llama-{hidden}-{layers}", folder / "texts.txt"
    write_checkpoint(source, hidden, layers)
    text.write_text("a" * (512 * FIT_TEXTS + 1))
    block = sum(2 * int(np.prod(s)) for name, s in shapes(hidden, 1).items() if ".layers." in name)
    row = in_process("fit_here", source, folder / f"fitted-{hidden}-{layers}", text, method)
    row |= {"layers": layers, "block_bytes": block, "limit_bytes": FIT_BYTES + 4 * block}
    print(f"{layers:>3} layers: {row}", file=sys.stderr)
    return row


def measure_fit(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    hidden, depths = options.hidden or 768, options.layers or [2, 16]
    method = "full" if options.method == "full" else "gptq"
    rows = [fit_row(folder, hidden, layers, method) for layers in depths]
    return {"method": method, "rows": rows, "holds": all(r["peak_bytes"] <= r["limit_bytes"] for r in rows)}


def measure_convert(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    hidden, depths = options.hidden or 4352, options.layers or [2, 4, 8, 16]
    rows = [convert_row(folder, hidden, layers, options.keep) for layers in depths]
    growth = rows[-1]["peak_bytes"] / rows[0]["peak_bytes"] - 1
    holds = growth < 0.05 and all(row["peak_bytes"] <= row["limit_bytes"] for row in rows)
    return {"rows": rows, "growth": growth, "holds": holds}


def measure_calibrate(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    hidden, depths = options.hidden or 1024, options.layers or [4, 16]
    rows = [calibrate_row(folder, hidden, layers, options.method) for layers in depths]
    grown = rows[-1]["stream"]["peak_bytes"] - rows[0]["stream"]["peak_bytes"]
    holds = grown < (rows[-1]["weight_bytes"] - rows[0]["weight_bytes"]) / 4
    return {"rows": rows, "grown_bytes": grown, "holds": holds}


COMMANDS = {"convert": measure_convert, "calibrate": measure_calibrate, "fit": measure_fit}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--hidden", type=int, help="width; a multiple of 256")
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument(
        "--method", default="uniform", help="of `calibrate`: uniform, paper or fast; of `fit`"
    )
    parser.add_argument("--folder", type=Path, help="where the models go; default: a temporary folder")
    parser.add_argument("--output", type=Path, help="a .json file for the result")
    parser.add_argument("--keep", action="store_true", help="of `convert`: leave the checkpoints in --folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = options.folder if options.keep and options.folder else Path(temporary)
        found = COMMANDS[options.what](options, folder) | {"machine": machine.facts()}
    result = json.dumps(found)
    print(result)
    if options.output:
        options.output.write_text(result + "\n")
    return 0 if found["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
