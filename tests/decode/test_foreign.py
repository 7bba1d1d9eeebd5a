"""What spqt replaces in other libraries: all of it is in the table, exists, and has the form relied on."""

import ast
import contextlib
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx import nn

import spqt_cli
from spqt_cli.decode import foreign, hooks, hooks_cpu, hooks_generate

PACKAGE = Path(spqt_cli.__file__).parent
FOREIGN = ("mlx", "mlx_lm", "transformers", "tokenizers", "lm_eval", "numpy", "tqdm")
ROWS = [*foreign.REPLACED, *foreign.CALLED]


def resolved(path: str) -> Any:
    """The module or class of a dotted path."""
    if path == foreign.ANY_MODULE:
        return nn.Module
    parts = path.split(".")
    for at in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:at]))
        except ModuleNotFoundError as error:
            if error.name in {"lm_eval", "datasets"}:  # an optional extra, of which mlx-lm's evaluate is made
                return None
            continue
        for part in parts[at:]:
            found = getattr(found, part)
        return found
    raise AssertionError(path)


def parameters(function: Any) -> list[str]:
    """Names of a function's parameters, of a compiled one by the first line of its documentation."""
    with contextlib.suppress(ValueError):
        found = list(inspect.signature(function).parameters)
        if found != ["args", "kwargs"]:  # all that some Pythons say of a compiled one
            return found
    first = (function.__doc__ or "").strip().splitlines()[0]
    return re.findall(r"[(,] *\**(\w+)", first.split("->")[0])


def parameters_in_source(row: foreign.Hook) -> list[str]:
    """The same for a module that can't be imported here, because it needs a package that is not installed."""
    module, _, _ = row.owner.partition(".MLXLM")
    found = importlib.util.find_spec(module)
    assert found is not None
    assert found.origin is not None
    tree = ast.parse(Path(found.origin).read_text())
    (function,) = [one for one in ast.walk(tree) if isinstance(one, ast.FunctionDef) and one.name == row.name]
    return [one.arg for one in function.args.args]


def as_text(row: foreign.Hook) -> str:
    return f"{row.owner}.{row.name}"


@pytest.mark.parametrize("row", ROWS, ids=as_text)
def test_each_row_is_there_as_it_is_relied_on(row):
    hooks_cpu.remove()  # MLX's own functions are looked at
    owner = resolved(row.owner)
    if owner is None:
        assert set(row.parameters) <= set(parameters_in_source(row))
        return
    found = getattr(owner, row.name)
    if row.owner != foreign.ANY_MODULE:
        assert foreign._path(owner) == row.owner
        missing = set(row.parameters) - set(parameters(inspect.unwrap(found)))
        assert not missing, f"{as_text(row)} has no {missing}"


@pytest.mark.parametrize("row", ROWS, ids=as_text)
def test_each_row_names_files_that_do_it(row):
    assert row.reason
    for name in row.by.split():
        assert row.name.strip("_") in (PACKAGE / name).read_text() or row.name == "__class__"


def test_replacing_what_is_not_listed_is_refused():
    with pytest.raises(KeyError, match="LayerNorm"):
        foreign.replace(nn.LayerNorm, "_extra_repr", lambda self: "")
    with pytest.raises(KeyError, match="softmax"):
        foreign.replace(mx, "softmax", None)


def test_replaced_puts_back_what_was_there():
    before = nn.Linear.__call__
    with pytest.raises(ZeroDivisionError), foreign.replaced([(nn.Linear, "__call__", lambda self, x: 1 / 0)]):
        nn.Linear(2, 2)(mx.zeros((1, 2)))
    assert nn.Linear.__call__ is before


def root(node: ast.AST) -> str | None:
    """The name at the beginning of `a.b[c].d(...)`."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def foreign_names(tree: ast.Module) -> set[str]:
    """Names that stand for modules and classes of others: imported, or assigned from what was imported."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                (alias.asname or alias.name).split(".")[0]
                for alias in node.names
                if alias.name.split(".")[0] in FOREIGN
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FOREIGN:
            names |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Attribute):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if root(node.value) in names:
                names |= {one.id for one in targets if isinstance(one, ast.Name)}
    return names


def changes(text: str) -> list[str]:
    """Statements that put an attribute into a foreign module or class, or change an object's class."""
    tree = ast.parse(text)
    names, found = foreign_names(tree), []
    for node in ast.walk(tree):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Name) and called.id == "setattr" and ast.unparse(node.args[0]) != "self":
            found.append(ast.unparse(node))
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) else []:
            for one in target.elts if isinstance(target, ast.Tuple) else [target]:
                special = isinstance(one, ast.Attribute) and one.attr in {"__class__", "__call__", "__init__"}
                if isinstance(one, ast.Attribute) and (special or root(one) in names):
                    found.append(ast.unparse(node))
    return found


def test_the_scan_finds_changes():
    assert changes("import mlx.nn as nn\nnn.Linear.__call__ = f")
    assert changes("from mlx_lm import server\nkind: Any = server.Generator\nkind.begin, b = f, g")
    assert changes("import mlx.core as mx\nsetattr(mx.fast, 'rope', f)")
    assert changes("module.__class__ = kind")
    assert not changes("import mlx.nn as nn\nlayer = nn.Linear(2, 2)\nself.x = nn.Linear\nlayer.weight = 1")


def test_sources_change_other_libraries_only_through_the_table():
    found = {
        str(path.relative_to(PACKAGE)): said
        for path in PACKAGE.rglob("*.py")
        if path.name != "foreign.py" and (said := changes(path.read_text()))
    }
    assert found == {}


UNTOUCHED = """
import importlib, sys, types
import mlx.core as mx, mlx.nn as nn, mlx_lm.generate, mlx_lm.utils, mlx_lm.server, mlx_lm.models.base

def state():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("mlx", "mlx_lm"):
            for key, value in list(vars(module).items()):
                if isinstance(value, (type, types.FunctionType)) or callable(value):
                    found[name, key] = id(value)
                if isinstance(value, type) and value.__module__.split(".")[0] in ("mlx", "mlx_lm"):
                    found |= {(name, key, k): id(v) for k, v in vars(value).items() if callable(v)}
    return found

before, finders = state(), list(sys.meta_path)
for name in sys.argv[1:]:
    importlib.import_module(name)
after = state()
changed = [key for key in before if before[key] != after.get(key)]
assert not changed, changed
assert sys.meta_path == finders, sys.meta_path
import spqt_cli.patch
assert state()["mlx.nn.layers.linear", "Linear", "to_quantized"] != before[
    "mlx.nn.layers.linear", "Linear", "to_quantized"]
"""


def test_importing_everything_but_patch_leaves_mlx_and_mlx_lm_alone():
    files = [path.relative_to(PACKAGE.parent).with_suffix("") for path in PACKAGE.rglob("*.py")]
    names = {".".join(path.parts).removesuffix(".__init__") for path in files}
    assert {"spqt_cli.decode.hooks", "spqt_cli.cli.main", "spqt_cli.patch"} <= names
    names -= {"spqt_cli.patch", "spqt_cli.__main__"}
    command = [sys.executable, "-c", UNTOUCHED, *sorted(names)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_loops_that_were_imported_by_name_are_replaced_too():
    hooks.install()
    import mlx_lm
    from mlx_lm import generate

    assert importlib.import_module("mlx_lm.generate").generate_step is hooks_generate.generate_step
    assert callable(generate)
    assert getattr(mlx_lm, "generate_step", hooks_generate.generate_step) is hooks_generate.generate_step
