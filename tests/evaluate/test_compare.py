"""`spqt compare`: what can't work is refused before any work; dense needs no thresholds; stock beside it."""

import pytest

from spqt_cli.decode import only_mlx, session
from spqt_cli.decode.options import Prompt
from spqt_cli.errors import SpqtError
from spqt_cli.evaluate import compare, several
from spqt_cli.evaluate.several import Wishes
from spqt_cli.evaluate.variants import EvaluateOptions
from tests.evaluate.test_variants import with_swapped_tokens


def test_missing_thresholds_are_told_before_the_dense_run(converted, monkeypatch):
    monkeypatch.setattr(session, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(SpqtError, match="no thresholds to derive 40% from") as caught:
        compare.compare(str(converted), Prompt("fox"), [0.0, 0.25, 0.4])
    assert caught.value.hint == f"spqt calibrate {converted} --sparsity 0.4"


def test_dense_alone_needs_no_thresholds(converted):
    (row,) = compare.compare(str(converted), Prompt("fox"), [0.0], max_tokens=2)
    assert row.statistics.generation_tokens == 2


def test_a_source_adds_stock_and_divergences(calibrated, checkpoint, tmp_path, monkeypatch):
    """Those of `spqt eval`, and stock runs nothing of ours."""
    text = tmp_path / "held-out.txt"
    text.write_text("pack my box with the quick brown fox " * 300)
    checked = []
    found = only_mlx.check_unpatched
    monkeypatch.setattr(compare, "check_unpatched", lambda model: checked.append(found(model)))
    reference = compare.Reference(str(checkpoint), text, 2)
    rows = compare.compare(str(calibrated), Prompt("fox"), [0.0, 0.4], 6, reference=reference)
    assert [row.name for row in rows] == ["stock", "dense", "40%"]
    assert checked == [None]
    assert rows[0].statistics.generation_tokens == 6
    assert rows[0].statistics.weight_bytes_per_token > 0
    options = EvaluateOptions(2, sparsity="0.4", baseline=str(checkpoint), rows=True)
    (one,) = several.evaluate(Wishes([str(calibrated)], [text], options, (2,)), lambda *_: None).texts
    by_name = {variant.name: variant.against["source"].kl for variant in one.variants[1:]}
    assert [row.divergence.mean for row in rows] == [
        by_name[name] for name in ("row-grouped", "dense", "40%")
    ]
    table = compare.report(rows)
    assert "KL to source" in table
    assert "2 windows of held-out.txt" in table
    assert all(len(line) <= 110 for line in table.splitlines())


def test_a_foreign_source_is_refused_before_any_run(calibrated, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    other = with_swapped_tokens(tmp_path / "other", 100)
    with pytest.raises(SpqtError, match="another tokenizer"):
        compare.compare(str(calibrated), Prompt("fox"), [0.0], reference=compare.Reference(str(other)))


@pytest.mark.parametrize(
    "case",
    [("missing", 2, "missing"), ("fox", 2, "window"), ("fox " * 2000, 0, "0 windows")],
)
def test_a_text_that_wont_do_is_refused_before_any_run(calibrated, checkpoint, tmp_path, monkeypatch, case):
    text, count, cause = case
    monkeypatch.setattr(session, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr(compare, "_stock", lambda *_: pytest.fail("stock ran"))
    path = tmp_path / "missing"
    if text != "missing":
        path = tmp_path / "text.txt"
        path.write_text(text)
    with pytest.raises(SpqtError, match=cause):
        compare.compare(
            str(calibrated), Prompt("fox"), [0.0], reference=compare.Reference(str(checkpoint), path, count)
        )
