"""A backend is one module and one line in `select`; nobody else asks for its name."""

import ast
import re
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

import spqt_cli
from spqt_cli.backends import interface, select
from spqt_cli.decode import active_counts, session
from spqt_cli.errors import UsageError
from tests.lib import numpy_backend
from tests.lib.backends import DEFINITION

PACKAGE = Path(spqt_cli.__file__).parent
NAMES = {"metal", "cuda", "cpu", "numpy"}


def decoded(folder):
    """Tokens, and the density of every layer."""
    with active_counts.counting() as counter:
        steps = generate_step(mx.array([60, 70, 80, 90]), session.load(folder).model, max_tokens=8)
        tokens = [int(token) for token, _ in steps]
    return tokens, sorted(density for _, density in counter.densities())


def test_a_new_backend_decodes_a_model_by_one_line(calibrated, monkeypatch):
    with monkeypatch.context() as definition:
        definition.setattr(select, "backend", lambda: DEFINITION)
        expected = decoded(calibrated)
    monkeypatch.setattr(select, "BACKENDS", (numpy_backend, *select.BACKENDS))  # the line
    numpy_backend.products.clear()
    assert select.backend().name == "numpy"
    assert decoded(calibrated) == expected
    assert len(numpy_backend.products) > 8 * 7  # seven products of a block, eight tokens


class Elsewhere:
    """A backend that does not run here."""

    def __init__(self, answer):
        self.answer = answer

    def find(self):
        return self.answer


def test_reasons_of_backends_that_do_not_run_are_told(monkeypatch):
    monkeypatch.setattr(select, "BACKENDS", (Elsewhere("no driver"), Elsewhere(None), Elsewhere("too old")))
    assert select.backend().name == "stock"
    assert select.backend().reason == "no driver; too old"


def test_without_optional_steps_each_answers_none(monkeypatch):
    monkeypatch.setattr(select, "BACKENDS", (numpy_backend,))
    steps = [name for name in vars(interface.FusedCalls) if name.startswith("prepare_")]
    assert len(steps) == 6
    for name in steps:
        count = getattr(select, name).__code__.co_argcount
        assert getattr(select, name)(*[None] * count) is None


def test_only_stock_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("SPQT_BACKEND", "stock")
    assert select.backend().name == "stock"
    monkeypatch.setenv("SPQT_BACKEND", "cuda")
    with pytest.raises(UsageError, match="can only be stock"):
        select.backend()


def asks_for_a_name(node: ast.AST) -> bool:
    """Whether a comparison or a lookup hangs on a backend's name."""
    if not isinstance(node, ast.Compare | ast.Subscript | ast.Match):
        return False
    text = ast.unparse(node.subject if isinstance(node, ast.Match) else node)
    constants = [one.value for one in ast.walk(node) if isinstance(one, ast.Constant)]
    about_backends = re.search(r"backend(\(\))?\.name\b", text) or (
        "stock" in constants and "backend" in text
    )
    return bool(about_backends) or (isinstance(node, ast.Compare) and not NAMES.isdisjoint(constants))


def comparisons_with_names(source: str) -> list[str]:
    return [ast.unparse(node) for node in ast.walk(ast.parse(source)) if asks_for_a_name(node)]


def test_nobody_compares_a_backend_s_name():
    files = [path for path in PACKAGE.rglob("*.py") if PACKAGE / "backends" not in path.parents]
    assert len(files) > 50
    found = {str(path): comparisons_with_names(path.read_text()) for path in files}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        "if select.backend().name == 'cuda': pass",
        "slow = backend.name in ('cpu', 'stock')",
        "known = name != other_backend.name",
        "match select.backend().name:\n    case 'cuda': pass",
        "steps = {'cuda': 8}[select.backend().name]",
    ],
)
def test_planted_comparison_is_seen(line):
    assert comparisons_with_names(line)
