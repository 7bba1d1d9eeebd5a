"""The tiny model that the self-test decodes twice.

Contract: the row passes where both runs give the same bits and no NaN; one NaN, or one bit, in one token of
either run fails it and names the token; a kernel that does not run fails it by its own words.
"""

import mlx.core as mx
import pytest

from spqt_cli.bench import thousand_tokens
from spqt_cli.cli import doctor
from tests.cli.test_doctor import RIGHT

FEW = 24  # tokens; the self-test's are 1,000


def spoilt(monkeypatch, run, token, spoil):
    """The real logits, but for what `spoil` makes of one token's in one of the runs."""
    real, runs = thousand_tokens._logits, []

    def logits(model, tokens, ahead):
        found = real(model, tokens, ahead)
        runs.append(ahead)
        if len(runs) == run:
            found[token, 3] = spoil(found[token, 3])
        return found

    monkeypatch.setattr(thousand_tokens, "_logits", logits)
    (row,) = thousand_tokens.rows(FEW)
    assert runs == [1, thousand_tokens.AHEAD]
    return row


def next_up(x):
    return (x.view(mx.uint32) + 1).view(mx.float32)


def test_two_runs_agree_in_all_bits():
    (row,) = thousand_tokens.rows(FEW)
    assert row["pass"]
    assert row["worst error"] == "equal"
    assert row["kernel"] == f"{FEW} tokens, twice"
    assert row.keys() == RIGHT.keys()


@pytest.mark.parametrize("run", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_nan_fails_the_row(monkeypatch, run, value):
    row = spoilt(monkeypatch, run, 17, lambda _: value)
    assert not row["pass"]
    assert row["worst error"] == f"1 tokens with NaN in the {('first', 'second')[run - 1]} run, from 17 on"


def test_one_bit_fails_the_row(monkeypatch):
    row = spoilt(monkeypatch, 2, 5, next_up)
    assert not row["pass"]
    assert row["worst error"] == "1 tokens differ, from 5 on"


def test_a_kernel_that_does_not_run_fails_the_row(monkeypatch):
    def refuse(*_):
        raise RuntimeError("unable to load kernel\nand more")

    monkeypatch.setattr(thousand_tokens, "_logits", refuse)
    (row,) = thousand_tokens.rows(FEW)
    assert not row["pass"]
    assert row["worst error"] == "unable to load kernel"


def test_layers_skip_half_and_blocks_run_fused(monkeypatch):
    """Else the row would say nothing of the kernels that skip."""
    from spqt_cli.backends import select
    from spqt_cli.decode import active_counts, fused, phase

    model = thousand_tokens._model(mx.float32)
    cache = thousand_tokens._cache(model)
    with active_counts.counting() as counter, phase.decoding():
        for token in thousand_tokens._tokens(FEW).tolist():
            mx.eval(model(mx.array([[token]]), cache=cache))
    shares = [share for _, share in counter.densities()]
    assert len(shares) == 14
    assert 0.3 < sum(shares) / len(shares) < 0.7
    if select.backend().fused:
        assert fused.report(model).fused == 2


def test_a_round_of_other_tokens_is_named(monkeypatch):
    real, runs = thousand_tokens._logits, []

    def logits(model, tokens, ahead):
        found = real(model, tokens, ahead)
        runs.append(tokens.tolist())
        if len(runs) == 3:
            found[1, 3] = float("nan")
        return found

    monkeypatch.setattr(thousand_tokens, "_logits", logits)
    (row,) = thousand_tokens.rows(4, rounds=3)
    assert row["kernel"] == "12 tokens, twice"
    assert row["worst error"] == "round 1: 1 tokens with NaN in the first run, from 1 on"
    assert runs[0] == runs[1] != runs[2]


def test_where_attention_is_not_repeatable_in_long_caches_several_are_filled(monkeypatch):
    prompt = thousand_tokens.PROMPT_TOKENS
    monkeypatch.setattr(thousand_tokens, "_most_keys", lambda tokens: prompt + 5)
    real, runs = thousand_tokens._logits, []

    def logits(model, tokens, ahead):
        found = real(model, tokens, ahead)
        runs.append(tokens.size - prompt)
        if len(runs) == 6:
            found[1, 3] = float("nan")
        return found

    monkeypatch.setattr(thousand_tokens, "_logits", logits)
    (row,) = thousand_tokens.rows(12)
    assert runs == [5, 5, 5, 5, 2, 2]
    assert row["worst error"] == "after 10 tokens: 1 tokens with NaN in the second run, from 1 on"


def test_the_self_test_ends_with_it(monkeypatch):
    monkeypatch.setattr("spqt_cli.backends.selftest.run", lambda: iter([{"kernel": "first"}]))
    monkeypatch.setattr(thousand_tokens, "rows", lambda: iter([{"kernel": "last"}]))
    assert [row["kernel"] for row in doctor.judged()] == ["first", "last"]
    assert f"{thousand_tokens.TOKENS} tokens, twice" in doctor.legend()
