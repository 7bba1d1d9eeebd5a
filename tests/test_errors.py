"""Every error for people says what to do about it."""

import ast
from pathlib import Path

import spqt_cli
from spqt_cli import errors

KINDS = {
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.SpqtError)
}


def test_every_error_has_a_hint():
    without = []
    for path in Path(spqt_cli.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS:
                hint = node.args[1] if len(node.args) > 1 else ast.Constant("")
                if isinstance(hint, ast.Constant) and not hint.value:
                    without.append(f"{path.name}:{node.lineno}")
    assert not without
