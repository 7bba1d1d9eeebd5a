"""`spqt compare`: what can't work is refused before any work; dense needs no thresholds; stock beside it."""

import pytest

from spqt_cli.decode import only_mlx, session
from spqt_cli.decode.options import Prompt
from spqt_cli.errors import SpqtError
from spqt_cli.evaluate import compare, compare_report, several, turns
from spqt_cli.evaluate.several import Wishes
from spqt_cli.evaluate.variants import EvaluateOptions
from tests.evaluate.test_variants import with_swapped_tokens


def test_missing_thresholds_are_told_before_the_dense_run(converted, monkeypatch):
    monkeypatch.setattr(session, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(SpqtError, match="no thresholds to derive 40% from") as caught:
        compare.compare(str(converted), Prompt("fox"), [0.0, 0.25, 0.4])
    assert caught.value.hint == f"spqt calibrate {converted} --sparsity 0.4"


def test_dense_alone_needs_no_thresholds(converted):
    (row,) = compare.compare(str(converted), Prompt("fox"), [0.0], compare.Effort(2))
    assert row.statistics.generation_tokens == 2


def test_a_source_adds_stock_and_divergences(calibrated, checkpoint, tmp_path, monkeypatch):
    """Those of `spqt eval`, and stock runs nothing of ours."""
    text = tmp_path / "held-out.txt"
    text.write_text("pack my box with the quick brown fox " * 300)
    checked = []
    found = only_mlx.check_unpatched
    for module in (compare, turns):
        monkeypatch.setattr(module, "check_unpatched", lambda model: checked.append(found(model)))
    reference = compare.Reference(str(checkpoint), text, 2)
    rows = compare.compare(str(calibrated), Prompt("fox"), [0.0, 0.4], compare.Effort(6), reference=reference)
    assert [row.name for row in rows] == ["stock", "dense", "40%"]
    assert checked == [None] * 5  # when it answers, and in four turns
    assert rows[0].statistics.generation_tokens == 6
    assert rows[0].statistics.weight_bytes_per_token > 0
    options = EvaluateOptions(2, sparsity="0.4", baseline=str(checkpoint), rows=True)
    (one,) = several.evaluate(Wishes([str(calibrated)], [text], options, (2,)), lambda *_: None).texts
    by_name = {variant.name: variant.against["source"].kl for variant in one.variants[1:]}
    assert [row.divergence.mean for row in rows] == [
        by_name[name] for name in ("row-grouped", "dense", "40%")
    ]
    table = compare_report.report(rows)
    assert "KL to source" in table
    assert "2 windows of held-out.txt" in table
    assert "Dense runs at" in table or "40% runs at" in table


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


def test_turns_are_of_equal_length_interleaved_and_warmed_up(calibrated, monkeypatch):
    taken, real = [], turns._turn

    def turn(way, clock, kept):
        taken.append((way.name, clock.tokens))
        return real(way, clock, kept)

    monkeypatch.setattr(turns, "_turn", turn)
    rows = compare.compare(str(calibrated), Prompt("fox"), [0.0, 0.2, 0.4], compare.Effort(5, rounds=3))
    assert taken == [("dense", 5), ("20%", 5), ("40%", 5)] * 4
    assert [len(row.speeds.rounds) for row in rows] == [3, 3, 3]
    assert rows[0].speeds.ratios == [1, 1, 1]
    for row in rows:
        wanted = [one / dense for one, dense in zip(row.speeds.rounds, rows[0].speeds.rounds, strict=True)]
        assert row.speeds.ratios == wanted


def test_a_turn_runs_on_past_the_end_of_an_answer(calibrated):
    """Answers end where the model ends them, and so would be timed over few tokens."""
    loaded = session.load(calibrated, dense=True)
    fed, call = [], type(loaded.model).__call__

    class Ending(type(loaded.model)):
        def __call__(self, inputs, **options):
            fed.append(inputs.shape[1])
            logits = call(self, inputs, **options)
            logits[..., 2] = 1e4  # the token that ends a text is the likeliest
            return logits

    loaded.model.__class__ = Ending
    assert turns._turn(turns.Way("x", lambda: loaded.model), turns.Clock([5, 6, 7], 6, 3), {}) > 0
    assert fed.count(1) >= 6 + turns.WARM_TOKENS - 1


@pytest.mark.parametrize("kept_at_all", [True, False])
def test_a_prompt_is_fed_once_and_each_turn_decodes_the_same(calibrated, monkeypatch, kept_at_all):
    loaded = session.load(calibrated, sparsity=0.4)
    fed, call = [], type(loaded.model).__call__

    class Watched(type(loaded.model)):
        def __call__(self, inputs, **options):
            fed.append(inputs)
            return call(self, inputs, **options)

    loaded.model.__class__ = Watched
    if not kept_at_all:
        monkeypatch.setattr(turns, "KEPT_PROMPT", 0)
    way, clock, kept, texts = turns.Way("x", lambda: loaded.model), turns.Clock([5, 6, 7, 9], 6, 3), {}, []
    for _ in range(3):
        fed.clear()
        turns._turn(way, clock, kept)
        texts.append([token for one in fed for token in one.reshape(-1).tolist()])
    again = texts[0][3:] if kept_at_all else texts[0]
    assert texts[0][:4] == [5, 6, 7, 9]
    assert [text[:10] for text in texts[1:]] == [again[:10]] * 2


def test_kl_to_dense_needs_no_source(calibrated, tmp_path):
    text = tmp_path / "held-out.txt"
    text.write_text("pack my box with the quick brown fox " * 300)
    reference = compare.Reference(None, text, 2)
    dense, sparse = compare.compare(
        str(calibrated), Prompt("fox"), [0.0, 0.4], compare.Effort(4), reference=reference
    )
    assert dense.divergence is None
    assert sparse.divergence.reference == "dense"
    assert sparse.kl_to_dense == sparse.divergence.mean > 0
    assert "KL to dense" in compare_report.report([dense, sparse])


def test_a_profile_loads_the_model_anew_for_every_turn(calibrated, monkeypatch):
    from spqt_cli.decode import profile

    loads, real = [], session.load
    monkeypatch.setattr(profile, "read", lambda: ({"unit": object()}, ""))
    monkeypatch.setattr(session, "apply_profile", lambda _: "")
    monkeypatch.setattr(session, "load", lambda *a, **k: loads.append(k) or real(*a, **k))
    ours = compare._Ours(compare.locate.open_folder(str(calibrated)))
    first, second = ours.at(0.4), ours.at(0.0)
    assert first is not second
    assert loads == [{"sparsity": 0.4, "dense": False}, {"sparsity": 0.0, "dense": True}]


def row(target: float, ratios: list[float], **more) -> compare.Row:
    from spqt_cli.decode.generate import Statistics

    size = 100 * (1 - target / 2)
    statistics = Statistics(9, 1.0, 9, 1.0, 1.0, "cpu", "test", target, size, 100.0, "length")
    speeds = turns.Speeds([10 * one for one in ratios], ratios)
    return compare.Row(target, "text", statistics, 2.0, speeds=speeds, timed_tokens=32, **more)


@pytest.mark.parametrize(
    ("ratios", "says"),
    [
        ([1.3, 1.2, 1.4], "Skipping gains here: at 40% 1.30 times as fast as dense (1.20 to 1.40 times"),
        ([0.97, 0.98, 0.99], "Skipping does not gain here: at 40% it is slower than dense"),
        ([0.9, 1.1, 1.2], "Skipping gains nothing that is sure here"),
    ],
)
def test_the_verdict(ratios, says):
    found = compare_report.verdict([row(0.0, [1, 1, 1]), row(0.4, ratios, kl_to_dense=0.2)])
    assert says in found
    assert "20% fewer bytes" in found
    assert ("--dense" in found) == (ratios[0] == 0.97)
    assert ("the text suffers, perplexity about +22%" in found) == (ratios[0] != 0.97)


def test_one_way_alone_gives_no_verdict():
    assert "Nothing to compare" in compare_report.verdict([row(0.0, [1, 1, 1])])


def test_fewer_rounds_than_a_range_needs_are_refused():
    with pytest.raises(SpqtError, match="--rounds 2"):
        compare.Effort(rounds=2)


def test_the_expectation_is_of_sizes(calibrated):
    line = compare.expectation(str(calibrated), [0.0, 0.5])
    assert "calibrated for 25%" in line
    loaded = session.load(calibrated, dense=True)
    other, zigzag = session.weight_bytes(loaded.model, loaded.config)
    skippable = sum(zigzag.values())
    assert f"50%: {(other + skippable) / (other + skippable / 2):.2f}" in line
    assert "0%:" not in line.replace("50%:", "")
