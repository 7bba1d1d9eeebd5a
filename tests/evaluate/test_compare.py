"""`spqt compare`: what can't work is refused before any work; dense needs no thresholds."""

import pytest

from spqt_cli.decode import session
from spqt_cli.decode.options import Prompt
from spqt_cli.errors import SpqtError
from spqt_cli.evaluate import compare


def test_missing_thresholds_are_told_before_the_dense_run(converted, monkeypatch):
    monkeypatch.setattr(session, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(SpqtError, match="no thresholds to derive 40% from") as caught:
        compare.compare(str(converted), Prompt("fox"), [0.0, 0.25, 0.4])
    assert caught.value.hint == f"spqt calibrate {converted} --sparsity 0.4"


def test_dense_alone_needs_no_thresholds(converted):
    (row,) = compare.compare(str(converted), Prompt("fox"), [0.0], max_tokens=2)
    assert row.statistics.generation_tokens == 2
