"""Reads presets: TOML settings of convert and calibrate, shipped in `configs/` or in a user's file."""

import tomllib
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from spqt_cli.errors import SpqtError, UsageError
from spqt_cli.format import layout, thresholds
from spqt_cli.system import files

LONGEST_BYTES = 1 << 20  # of a preset's file


@dataclass(frozen=True)
class Preset:
    """Settings of one preset; None means: leave it to the command's own default.

    bits, group_size: of the Zigzag layers. sparsity: fraction of channels to skip, 0 to 0.95.
    method: of calibration. tokens: of calibration text. skip: layer paths, by suffix, kept row-grouped.
    head_bits: of embedding and head. projections: (suffix of paths, bits, group size) of those that differ.
    """

    bits: int | None = None
    group_size: int | None = None
    sparsity: float | None = None
    method: str | None = None
    tokens: int | None = None
    skip: tuple[str, ...] = ()
    head_bits: int | None = None
    projections: tuple[tuple[str, int, int], ...] = ()


SECTIONS: dict[str, dict[str, type]] = {
    "quantization": {"bits": int, "group_size": int, "head_bits": int},
    "calibration": {"sparsity": float, "method": str, "tokens": int},
    "layers": {"skip": list},
}
PROJECTIONS = "projections"  # a section of layers' own settings: k_proj = {bits = 8, group_size = 64}


def meaning(name: str) -> str:
    """What a shipped preset is for: the comment at the head of its file."""
    head = []
    for line in _shipped(name).splitlines():
        if not line.startswith("#"):
            break
        head.append(line.removeprefix("#").strip())
    return " ".join(head)


def _shipped(name: str) -> str:
    return (resources.files("spqt_cli.configs") / f"{name}.toml").read_text(encoding="utf-8")


def names() -> list[str]:
    """The shipped presets."""
    folder = resources.files("spqt_cli.configs")
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".toml"))


def load_preset(name_or_path: str) -> Preset:
    """The preset of that name, or in that TOML file. Unknown sections and keys are errors."""
    if name_or_path in names():
        text = _shipped(name_or_path)
    else:
        try:
            text = files.read_bounded(Path(name_or_path), LONGEST_BYTES).decode("utf-8")
        except (OSError, UnicodeDecodeError):
            hint = f"use one of {', '.join(names())}, or a .toml file"
            kind = SpqtError if name_or_path.endswith(".toml") or Path(name_or_path).exists() else UsageError
            raise kind(f"there is no preset {name_or_path!r}", hint + files.near(name_or_path)) from None
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpqtError(f"preset {name_or_path}: {error}", "correct the TOML") from None
    return _parse(document, name_or_path)


def _parse(document: dict[str, Any], name: str) -> Preset:
    values: dict[str, Any] = {}
    for section, content in document.items():
        if section == PROJECTIONS and isinstance(content, dict):
            values[PROJECTIONS] = tuple(_projection(*item, name) for item in content.items())
            continue
        known = SECTIONS.get(section)
        if known is None or not isinstance(content, dict):
            sections = ", ".join([*SECTIONS, PROJECTIONS])
            raise SpqtError(f"preset {name}: unknown section [{section}]", f"sections: {sections}")
        for key, value in content.items():
            if key not in known:
                raise SpqtError(
                    f"preset {name}: unknown key {key!r} in [{section}]", f"keys: {', '.join(known)}"
                )
            wanted: Any = (int, float) if known[key] is float else known[key]
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise SpqtError(
                    f"preset {name}: {key} = {value!r} is not a {known[key].__name__}",
                    f"give a {known[key].__name__}",
                )
            values[key] = tuple(value) if isinstance(value, list) else value
    preset = Preset(**values)
    check(preset)
    return preset


def _projection(suffix: str, content: Any, name: str) -> tuple[str, int, int]:
    """(suffix of layer paths, bits, group size) of one line under [projections]."""
    keys = {"bits", "group_size"}
    integers = isinstance(content, dict) and all(type(value) is int for value in content.values())
    if not integers or content.keys() != keys:
        raise SpqtError(
            f"preset {name}: {suffix!r} in [{PROJECTIONS}] needs bits and a group size",
            f"{suffix} = {{bits = 8, group_size = 64}}",
        )
    return suffix, content["bits"], content["group_size"]


def check(preset: Preset) -> None:
    """Refuse values outside their range (exit 2)."""
    own = [(bits, group_size) for _, bits, group_size in preset.projections]
    for bits, group_size in [(preset.bits, preset.group_size), (preset.head_bits, None), *own]:
        layout.check(bits, group_size)
    thresholds.check_sparsity(preset.sparsity)
    if preset.tokens is not None and preset.tokens < 1:
        raise UsageError(f"{preset.tokens} tokens of calibration text", "give a positive number")


def merged(preset: Preset, **overrides: Any) -> Preset:
    """`preset` with the values that are given (not None) on the command line put over it."""
    values = {field.name: getattr(preset, field.name) for field in fields(preset)}
    values.update({key: value for key, value in overrides.items() if value is not None})
    result = Preset(**values)
    check(result)
    return result
