"""Architectures of mlx-lm in several processes on the loopback: the same greedy tokens as in one?

    python -m tests.distributed                        six families, two and four processes, memory beside
    python -m tests.distributed --all --processes 2    every architecture that mlx-lm can cut

Each is made tiny, converted and calibrated, then run by one process and by several, tensor parallel and as a
pipeline, dense and sparse. Exit 1 where tokens differ, or a family takes more memory than it may.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests import ROOT
from tests.lib import architecture_configs, processes

FAMILIES = ("llama", "qwen3", "gemma3", "qwen3_moe", "deepseek_v3", "gpt_oss")
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}  # which four processes can share
# So large that layers are most of it, as in real models.
LARGE = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "moe_intermediate_size": 512,
    "num_experts": 8, "n_routed_experts": 8, "num_local_experts": 8, "q_lora_rank": 128,
}  # fmt: skip
MOST = {2: 0.55, 4: 0.3}  # of the memory of one process, of the larger models


def config(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """A tiny config.json with those changes whose names it has."""
    found = architecture_configs.config(name)
    inner = found.get("text_config", found)
    inner.update({key: value for key, value in changes.items() if key in inner})
    if "layer_types" in inner and len(inner["layer_types"]) != inner["num_hidden_layers"]:
        del inner["layer_types"]
    return found


def make(name: str, folder: Path, changes: dict[str, Any]) -> Path:
    """A converted and calibrated folder of an architecture with seeded weights."""
    from spqt_cli.calibrate import calibrate
    from spqt_cli.convert import convert
    from tests.lib import architecture_check, greedy, settled

    source, output = folder / f"{name}-source", folder / name
    architecture_check.write_source(config(name, changes), source, seed=len(name))
    convert.convert(str(source), output, convert.ConvertOptions(group_size=32))
    options = calibrate.CalibrateOptions(sparsity=0.4, tokens=256, window=64, method="fast")
    calibrate.calibrate(output, options, lambda *_: None)
    thresholds = settled.settle(output, lambda loaded: greedy.written(loaded, greedy.TOKENS))
    (output / settled.FILE).write_text(json.dumps(thresholds))
    return output


def can_be_cut(name: str) -> bool:
    """Whether mlx-lm, or spqt for it, cuts an architecture in any way."""
    from spqt_cli.decode import shard_blocks

    try:
        module = importlib.import_module(f"mlx_lm.models.{name}")
    except (SystemExit, ImportError):
        return False
    kinds = [value for value in vars(module).values() if isinstance(value, type)]
    return hasattr(module, "Model") and (
        name in shard_blocks.TYPES
        or any(hasattr(kind, way) for kind in kinds for way in ("shard", "pipeline"))
    )


def run(folders: list[Path], count: int) -> list[dict[str, Any]]:
    """What tests.lib.greedy says of each folder, with so many processes."""
    command = [sys.executable, "-m", "tests.lib.greedy", *folders]
    if count == 1:
        done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)
        ended = [processes.Ended(done.returncode, done.stdout, done.stderr)]
    else:
        ended = processes.ring(count, command, timeout=600)
    found = [json.loads(line) for line in ended[0].out.splitlines() if line.startswith("{")]
    if len(found) < len(folders):
        said = "\n".join(f"{one.code}: {one.err[-1500:]}" for one in ended)
        found += [{"failed": said}] * (len(folders) - len(found))
    return found


def judge(
    name: str, count: int, one: dict[str, Any], found: dict[str, Any], most: float
) -> list[tuple[str, bool]]:
    """(a line for each way, whether it is as it should be). most: memory, of one process's."""
    if "failed" in found:
        return [(f"{name:20} {count} processes: FAILED {found['failed']}", False)]
    lines = []
    for way, there in found.items():
        if "reason" in there:
            text = f"{name:20} {count} {way:9} not possible: {there['reason']}"
            lines.append((text, name not in FAMILIES or way == "pipeline"))
            continue
        same = [there[kind] == one["one"][kind] for kind in ("dense", "sparse")]
        said = ["same" if each else "DIFFER" for each in same]
        share, skipped = (
            there["peak"] / one["one"]["peak"],
            (there["sparse_skipped"], one["one"]["sparse_skipped"]),
        )
        fits = way != "tensor" or name not in FAMILIES or share <= most
        figures = "skipped {:.1%} (in one {:.1%})".format(*skipped)
        text = f"dense {said[0]}, sparse {said[1]}, {figures}, memory {share:.2f} of one process"
        lines.append((f"{name:20} {count} {way:9} {text}", all(same) and fits))
    return lines


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every architecture, tiny")
    parser.add_argument("--only", nargs="*", help="these architectures")
    parser.add_argument("--processes", default="2,4")
    wished = parser.parse_args()
    names = wished.only or FAMILIES
    if wished.all:
        names = [name for name in architecture_configs.names() if can_be_cut(name)]
    counts = [int(one) for one in wished.processes.split(",")]
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            try:
                made = make(name, Path(folder), HEADS | ({} if wished.all else LARGE))
            except Exception as error:  # one architecture must not cost the others
                print(f"{name:20} can't be made: {error}", flush=True)
                continue
            (one,) = run([made], 1)
            for count in counts:
                (found,) = run([made], count)
                most = 1.0 if wished.all else MOST.get(count, 1.0)
                for line, right in judge(name, count, one, found, most):
                    wrong += not right
                    print(line, flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
