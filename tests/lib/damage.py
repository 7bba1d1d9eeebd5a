"""Seeded damage to a model's files: bytes, lengths, headers, configs, thresholds, indexes, strays.

It damages and knows no promise; `hostile` holds one against the result.
"""

import contextlib
import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open

SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"
GGUF = "model.gguf"
GGUF_HEADER = 20_000  # bytes; the metadata and the tensors' places in the tiny file
ODD: list[Any] = [
    None, 0, -1, 1, 2, 3, 7, 1 << 31, 1 << 40, 1 << 63, 1 << 70, 1.5, -0.0, math.nan, math.inf, "", "x", "2",
    "\ud800", "\0", "../x.safetensors", "/x", [], [1], [[]], {}, {"a": {"b": 1}}, True, False, "float16",
    {"type": "linear"}, {"rope_type": "llama3"}, {"rope_type": "yarn", "factor": 2.0},
]  # fmt: skip
KEYS = (
    "rope_scaling", "text_config", "quantization", "quantization_config", "spqt", "attention_bias",
    "layer_types", "sliding_window", "rope_parameters", "head_dim", "model_file", "architectures", "dtype",
    "eos_token_id",
)  # fmt: skip
DTYPES = ("F32", "F16", "BF16", "F64", "F8_E4M3", "U8", "I64", "BOOL", "F4", "f32", "", "C64", 3, None)


def _own(path: Path) -> Path:
    """`path`, made a file of its own: the copy shares unchanged files with the sound model."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    return path


def _bytes(folder: Path, rng: random.Random) -> None:
    """Change some bytes of the shard, mostly in its header."""
    path = _own(folder / SHARD)
    content = bytearray(path.read_bytes())
    if not content:
        return
    header = 8 + int.from_bytes(content[:8], "little")
    end = min(header, len(content)) if rng.random() < 0.8 else len(content)
    for _ in range(rng.randint(1, 4)):
        content[rng.randrange(end)] = rng.randrange(256)
    path.write_bytes(content)


def _length(folder: Path, rng: random.Random) -> None:
    """Truncate or lengthen a file."""
    path = _own(folder / rng.choice([SHARD, "config.json", "tokenizer.json", "tokenizer_config.json"]))
    size = path.stat().st_size
    os.truncate(path, rng.choice([0, 1, 7, 8, size // 2, max(size - 1, 0), size + 1, size + 4096]))


def _header(folder: Path, rng: random.Random) -> None:
    """Change an entry of the shard's header, in valid JSON."""
    path = _own(folder / SHARD)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:start])
        name = rng.choice(sorted(header))
        entry = header[name]
        what = rng.choice(["dtype", "shape", "data_offsets", "rename", "drop", "odd", "dim"])
        if what == "dtype":
            entry["dtype"] = rng.choice(DTYPES)
        elif what == "dim":
            entry["shape"][0] = rng.choice(ODD)
        elif what in ("shape", "data_offsets"):
            entry[what] = [
                rng.choice([0, -1, 1, 64, 1 << 40, 1 << 64, 2.0]) for _ in range(rng.randint(0, 3))
            ]
        elif what == "odd":
            header[name] = rng.choice(ODD)
        elif what == "drop":
            del header[name]
        else:
            header[rng.choice(["x", "", "a" * 5000, "model.norm.weight"])] = header.pop(name)
    except (ValueError, KeyError, TypeError, IndexError):
        return  # an earlier damage left no header to change
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])


def _config(folder: Path, rng: random.Random) -> None:
    """Change values of config.json at any depth."""
    path = _own(folder / "config.json")
    try:
        config = json.loads(path.read_text())
    except ValueError:
        return
    place = config
    while isinstance(place, dict) and rng.random() < 0.4:
        inner = [value for value in place.values() if isinstance(value, dict) and value]
        if not inner:
            break
        place = rng.choice(inner)
    if not isinstance(place, dict):
        return
    key = rng.choice([*sorted(place), *(KEYS if place is config else ())] or ["x"])
    if rng.random() < 0.15:
        place.pop(key, None)
    else:
        place[key] = rng.choice(ODD)
    path.write_text(json.dumps(config))


def _index(folder: Path, rng: random.Random) -> None:
    """Write an index, sound but for one entry."""
    try:
        with safe_open(folder / SHARD, framework="np") as file:
            names = sorted(file.keys())
    except Exception:  # damaged before; the index then names nothing
        names = []
    weight_map: dict[str, Any] = dict.fromkeys(names, SHARD)
    if rng.random() < 0.7:
        weight_map[rng.choice([*names, "x"])] = rng.choice(
            [*ODD, "model-2.safetensors", "sub/model.safetensors"]
        )
    text = rng.choice([json.dumps({"weight_map": weight_map})] * 8 + ["", "[", "[]", '{"weight_map": 3}'])
    (folder / INDEX).unlink(missing_ok=True)  # an earlier damage may have made it a link
    (folder / INDEX).write_text(text)


def _stray(folder: Path, rng: random.Random) -> None:
    """Add, remove or replace a file."""
    what = rng.choice(["stale", "gone", "link", "folder"])
    name = rng.choice([SHARD, "config.json", "tokenizer.json", INDEX])
    if what == "stale":
        (folder / "model-00007-of-00007.safetensors").write_bytes(rng.randbytes(rng.choice([0, 8, 100])))
        return
    (folder / name).unlink(missing_ok=True)
    if what == "link":
        (folder / name).symlink_to(rng.choice(["../outside", "nowhere", name]))
    elif what == "folder":
        (folder / name).mkdir()


def _thresholds(folder: Path, rng: random.Random) -> None:
    """Change what calibration wrote: an entry's threshold or curve, or the section about the text."""
    path = _own(folder / "config.json")
    try:
        config = json.loads(path.read_text())
        entries = [e for e in config["quantization"].values() if isinstance(e, dict) and "spqt" in e]
        place = rng.choice([*(entry["spqt"] for entry in entries), config["spqt"]["calibration"]])
        key = rng.choice(sorted(place))
        if key == "curve" and rng.random() < 0.5:
            place[key][rng.randrange(len(place[key]))] = rng.choice(ODD)
        elif rng.random() < 0.2:
            del place[key]
        else:
            place[key] = rng.choice(ODD)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return  # an earlier damage left nothing to change
    path.write_text(json.dumps(config))


def _gguf(folder: Path, rng: random.Random) -> None:
    """Change bytes of a .gguf file, mostly of its metadata, or cut it."""
    path = _own(folder / GGUF)
    content = bytearray(path.read_bytes())
    if not content:
        return
    end = min(len(content), GGUF_HEADER) if rng.random() < 0.9 else len(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        content[rng.randrange(end)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    path.write_bytes(content[: rng.randrange(len(content))] if rng.random() < 0.1 else content)


_Damage = Callable[[Path, random.Random], None]
DAMAGE: tuple[_Damage, ...] = (_bytes, _length, _header, _config, _config, _index, _stray)


def damage(folder: Path, rng: random.Random) -> None:
    """Damage a model's folder in one to three ways that suit it; what it changes is no longer a link."""
    if (folder / GGUF).exists():
        kinds: tuple[_Damage, ...] = (_gguf,)
    elif "calibration" in json.loads((folder / "config.json").read_text()).get("spqt", ()):
        kinds = (*DAMAGE, _thresholds, _thresholds, _thresholds)
    else:
        kinds = DAMAGE
    for _ in range(rng.randint(1, 3)):
        with contextlib.suppress(OSError):  # an earlier damage took the file away
            rng.choice(kinds)(folder, rng)
