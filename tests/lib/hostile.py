"""Damaged sources and converted folders, and the promise that holds for every one of them.

The promise: an SpqtError or success, nothing else; what is accepted is accepted by `safetensors` too, and
what was converted from it verifies. Used by test_fuzz.py for few cases and by torture.py for many.
"""

import os
import random
import shutil
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from safetensors import safe_open

from spqt_cli.calibrate import calibrate
from spqt_cli.cli import describe
from spqt_cli.convert import convert
from spqt_cli.convert.convert import ConvertOptions
from spqt_cli.decode import generate, session
from spqt_cli.decode.options import Options, Prompt, Sampling
from spqt_cli.errors import SpqtError
from spqt_cli.format.folder import Folder
from tests.conftest import ARCHITECTURES, random_weights, tiny_checkpoint, tiny_config
from tests.lib import damage, writing_gguf

CONVERTED = ("converted", "calibrated")
QUICK = calibrate.CalibrateOptions(sparsity=0.3, tokens=256, window=64, method="uniform")


def prepare(folder: Path) -> dict[str, Path]:
    """Sound models to damage: a checkpoint of each architecture, a .gguf file in a folder of its own, a
    converted folder without and one with thresholds.
    """
    found = {arch: tiny_checkpoint(folder / arch, arch, num_hidden_layers=1) for arch in ARCHITECTURES}
    found["converted"] = folder / "converted"
    convert.convert(str(found["llama"]), found["converted"], ConvertOptions(group_size=32))
    found["calibrated"] = folder / "calibrated"
    shutil.copytree(found["converted"], found["calibrated"])
    calibrate.calibrate(found["calibrated"], QUICK, lambda *_: None)
    found["gguf"] = folder / "gguf"
    found["gguf"].mkdir()
    config = tiny_config("llama", num_hidden_layers=1)
    weights = {name: np.array(weight) for name, weight in random_weights(config, 0).items()}
    kind = GGMLQuantizationType.Q8_0
    writing_gguf.write_model(found["gguf"] / damage.GGUF, "llama", config, weights, kind=kind)
    return found


def attempt(seed: int, sound: dict[str, Path], work: Path) -> str:
    """Damage a copy of a sound model by `seed` and hold the promise against it; what happened.

    Raises whatever breaks the promise.
    """
    rng = random.Random(seed)
    name = rng.choice(sorted(sound))
    folder, output = work / "case", work / "out"
    for path in (folder, output):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(sound[name], folder, copy_function=os.link)  # damage takes what it changes apart
    (work / "outside").write_text("not the model's")  # where some of the damage's links lead
    damage.damage(folder, rng)
    try:
        how = _use_converted(folder, rng) if name in CONVERTED else _use_source(folder, output, rng)
    except SpqtError as error:
        if not error.cause:
            raise AssertionError("an error without a cause") from error
        if output.exists():
            raise AssertionError("half-written output") from error
        return f"refused with exit {error.exit_code}"
    if name != "gguf":
        with safe_open(folder / damage.SHARD, framework="np") as file:
            file.keys()
    return how


def _use_source(folder: Path, output: Path, rng: random.Random) -> str:
    """Plan a conversion or carry it out; its result must then be sound."""
    path = folder / damage.GGUF if (folder / damage.GGUF).exists() else folder
    dry_run = rng.random() < 0.9
    convert.convert(str(path), output, ConvertOptions(group_size=32, dry_run=dry_run))
    if dry_run:
        return "accepted"
    Folder(output).verify()
    return "converted"


def _use_converted(folder: Path, rng: random.Random) -> str:
    """Check a converted folder; then, at times, answer a prompt with it."""
    if rng.random() < 0.5:
        Folder(folder).verify()
    else:
        describe.describe(str(folder)).text()
    if rng.random() < 0.8:
        return "accepted"
    loaded = session.load(folder)
    tokens = generate.encode(loaded, Prompt("the quick brown fox"))
    for _ in generate.stream(loaded, tokens, Sampling(), Options(max_tokens=3)):
        pass
    return "ran"
