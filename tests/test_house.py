"""Imports run in one direction: a package imports only what stands below it, and there is no circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import spqt_cli

PACKAGE = Path(spqt_cli.__file__).parent
# A package may import those listed before it; modules of the top level are named as they are.
ORDER = (
    "errors",
    "version",
    "system",
    "format",
    "backends",
    "decode",
    "patch",
    "serve",
    "measure",
    "convert",
    "calibrate",
    "fit",
    "adapt",
    "evaluate",
    "bench",
    "cli",
)
FACE = ("__init__", "__main__")  # the package's face: may import any, lazily; nobody imports it
MOST_LEVELS = 10


def _modules() -> dict[str, Path]:
    """Dotted name below spqt_cli -> file; a package's own file under the package's name."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return names


MODULES = _modules()


def _imports(name: str) -> set[str]:
    """The modules of spqt_cli that a module imports anywhere in its text, in functions as well."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "spqt_cli":
            base = ".".join((node.module or "").split(".")[1:])
            for alias in node.names:
                full = f"{base}.{alias.name}".lstrip(".")
                found.add(full if full in MODULES else base or "__init__")
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("spqt_cli.")
            }
    return found - {name}


ARROWS = {name: _imports(name) for name in MODULES}


def _rank(name: str) -> int:
    return ORDER.index(name.split(".", maxsplit=1)[0])


@pytest.mark.parametrize("name", [name for name in MODULES if name not in FACE])
def test_imports_point_downwards(name: str) -> None:
    upwards = {other for other in ARROWS[name] if other in FACE or _rank(other) > _rank(name)}
    assert not upwards, f"{name} imports {sorted(upwards)}"


def test_no_circles() -> None:
    assert len(list(TopologicalSorter(ARROWS).static_order())) == len(MODULES)  # raises for a circle


FOLDERS = sorted({name.rpartition(".")[0] for name in MODULES})


@pytest.mark.parametrize("folder", FOLDERS, ids=[name or "spqt_cli" for name in FOLDERS])
def test_levels_in_a_folder_are_few(folder: str) -> None:
    """Files and packages that stand side by side, each package taken as one."""
    arrows: dict[str, set[str]] = {}
    for name, others in ARROWS.items():
        if (room := _room(name, folder)) and room not in FACE:
            found = {_room(one, folder) for one in others} - {None, room}
            arrows.setdefault(room, set()).update(one for one in found if one)
    for room in arrows:
        chain = _longest(room, arrows)
        assert len(chain) <= MOST_LEVELS, " -> ".join(chain)


def _room(name: str, folder: str) -> str | None:
    """What `name` stands in or is, directly in `folder`; None if it stands elsewhere."""
    path, above = name.split("."), folder.split(".") if folder else []
    return path[len(above)] if path[: len(above)] == above and len(path) > len(above) else None


def _longest(name: str, arrows: dict[str, set[str]], above: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The longest chain of imports that begins with `name`; fails where one comes back."""
    assert name not in above, f"a circle: {' -> '.join([*above[above.index(name) :], name])}"
    chains = [_longest(one, arrows, (*above, name)) for one in arrows.get(name, ())]
    return (name, *max(chains, key=len, default=()))
