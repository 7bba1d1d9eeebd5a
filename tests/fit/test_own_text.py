"""Text that a model writes itself: repeatable, of the kinds asked for, within the model's context."""

import itertools
import json
from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.backends.cpu import status as cpu_status
from spqt_cli.convert import source_model
from spqt_cli.decode import session
from spqt_cli.errors import SpqtError
from spqt_cli.fit import own_text, starts
from spqt_cli.measure import many_texts
from tests.conftest import VOCAB, tiny_checkpoint

RUNS = cpu_status()[0]


def quiet(*_) -> None:
    pass


@pytest.fixture(scope="module")
def model(checkpoint):
    return source_model.load(str(checkpoint))


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return session.load_tokenizer(checkpoint)


def without(folder: Path, *keys: str, arch: str = "llama"):
    """The tokenizer of a tiny checkpoint whose settings lack some keys."""
    tiny_checkpoint(folder, arch)
    path = folder / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in keys}
    path.write_text(json.dumps(kept))
    return session.load_tokenizer(folder)


def test_the_seed_alone_decides(model, tokenizer):
    found = own_text.windows(model, tokenizer, own_text.Wishes(6, 24, 3), quiet)
    mx.random.seed(99)
    np.random.seed(99)
    assert np.array_equal(own_text.windows(model, tokenizer, own_text.Wishes(6, 24, 3), quiet), found)
    assert (own_text.windows(model, tokenizer, own_text.Wishes(6, 24, 4), quiet) != found).mean() > 0.5
    assert (found.shape, found.dtype) == ((6, 24), np.int32)
    assert 0 <= found.min() <= found.max() < VOCAB


def test_each_text_begins_as_it_was_started(model, tokenizer):
    found = own_text.windows(model, tokenizer, own_text.Wishes(8, 32), quiet)
    for row, start in zip(found, starts.starts(tokenizer, VOCAB, 8, 0), strict=True):
        assert row[: len(start)].tolist() == start[:32]


def test_what_is_sampled_follows_the_models_own_distribution(model, tokenizer):
    """Of 4000 second tokens after one BOS, the commonest come as often as the logits say."""
    rows = own_text._write(model, [[1]] * 4000, 2, np.random.SeedSequence(0), quiet)
    p = np.array(mx.softmax(model(mx.array([[1]]))[0, -1]))
    counted = np.bincount(rows[:, 1], minlength=VOCAB) / len(rows)
    for token in np.argsort(-p)[:5]:
        assert abs(counted[token] - p[token]) < 5 * np.sqrt(p[token] / len(rows))
    assert counted[p < 1e-7].sum() < 1e-3


def test_texts_do_not_depend_on_their_neighbours_length(model, tokenizer):
    """A short start sampled beside a longer one follows its own context: likelier than under the other's."""
    rows = own_text._write(model, [[1], [3, 5, 7, 9, 11, 13]], 8, np.random.SeedSequence(2), quiet)
    assert rows[1, :6].tolist() == [3, 5, 7, 9, 11, 13]
    again = own_text._write(model, [[1], [4, 6, 8, 10, 12, 14]], 8, np.random.SeedSequence(2), quiet)
    assert np.array_equal(rows[0], again[0])


@pytest.mark.parametrize(("count", "each"), [(40, 2), (72, 6), (448, 2)])
def test_a_text_that_repeats_itself_is_begun_anew_from_another_start(
    model, tokenizer, monkeypatch, count, each
):
    tried = []

    def write(model, begun, length, *_):
        tried.append(begun)
        return np.ones((len(begun), length), np.int32)

    monkeypatch.setattr(own_text, "_write", write)
    monkeypatch.setattr(own_text, "AT_ONCE", count)
    monkeypatch.setattr(own_text, "CACHE_FRACTION", 1.0)
    own_text.windows(model, tokenizer, own_text.Wishes(count, 8, openings_each=each), quiet)
    assert [len(one) for one in tried] == [count] * (own_text.TRIES + 1)
    for earlier, later in itertools.pairwise(tried):
        assert sum(a == b for a, b in zip(earlier, later, strict=True)) < count / 8


@pytest.mark.parametrize("arch", ["qwen2", "gemma3"])
def test_other_architectures(tmp_path, arch):
    """Among them a cache that slides: 64 tokens of it are full before the text ends."""
    folder = tiny_checkpoint(tmp_path / arch, arch)
    model, tokenizer = source_model.load(str(folder)), session.load_tokenizer(folder)
    found = own_text.windows(model, tokenizer, own_text.Wishes(4, 80), quiet)
    logits = np.array(model(mx.array(found[:, :-1])))
    picked = np.take_along_axis(logits, found[:, 1:, None], -1)[..., 0]
    mean = logits.mean(axis=-1)
    assert (picked[:, 60:] - mean[:, 60:]).mean() > 0.2  # sampled tokens are likelier than others


def test_two_fifths_are_openings_and_the_other_kinds_come_equally_often(tokenizer):
    found = starts.starts(tokenizer, VOCAB, 40, 0)
    chat, document = starts.chat_turn(tokenizer), starts.document_start(tokenizer)
    kinds = Counter(
        "chat" if one == chat else "document" if one == document else len(one) > 1 for one in found
    )
    assert kinds == {"chat": 8, "document": 8, True: 16, False: 8}
    assert chat == tokenizer.encode("<|user|>", add_special_tokens=False)
    assert document == [1]


def test_six_openings_for_three_other_starts_are_each_of_them_once_in_72(tokenizer):
    found = starts.starts(tokenizer, VOCAB, 72, 0, openings_each=6)
    known = starts.openings(tokenizer)
    opened = sorted(one for one in found if one in known)
    assert opened == sorted(known)
    assert [one in known for one in found[:9]] == [False, True, True] * 3
    assert not [one for one in starts.starts(tokenizer, VOCAB, 9, 0, openings_each=0) if one in known]


def test_no_template_leaves_chat_out(tmp_path):
    tokenizer = without(tmp_path / "plain", "chat_template")
    assert starts.chat_turn(tokenizer) == []
    found = starts.starts(tokenizer, VOCAB, 12, 0)
    assert found.count([1]) == 3


def test_a_template_that_fails_or_hides_the_words_leaves_chat_out(tokenizer, monkeypatch):
    for template in ("{{ raise_exception('no') }}", "{{ messages[0].content | upper }}", "nothing"):
        monkeypatch.setattr(tokenizer._tokenizer, "chat_template", template)
        assert starts.chat_turn(tokenizer) == []


def test_without_a_bos_the_document_starts_by_its_eos_or_not_at_all(tmp_path):
    tokenizer = without(tmp_path / "eos", "bos_token")
    assert starts.document_start(tokenizer) == [2]
    bare = without(tmp_path / "bare", "bos_token", "eos_token", "chat_template")
    assert starts.document_start(bare) == []
    assert all(starts.starts(bare, VOCAB, 8, 0))


def test_a_vocabulary_smaller_than_the_tokenizers(tokenizer):
    """Starts that the model has no tokens for are left out."""
    found = starts.starts(tokenizer, 100, 40, 0)
    assert max(map(max, found)) < 100
    few = starts.starts(tokenizer, 1, 4, 0)  # not even a BOS: token 0, since nothing else is there
    assert few == [[0]] * 4


def test_a_random_token_is_no_special_one(tokenizer):
    words = starts._words(tokenizer, VOCAB)
    assert not set(words.tolist()) & {0, 1, 2, 3, 4}


def test_shipped_openings_are_many_and_short(tokenizer):
    found = starts.openings(tokenizer)
    assert len(found) >= 40
    assert all(found)


def test_beyond_the_models_context(model, tokenizer):
    with pytest.raises(SpqtError, match="context is 512"):
        own_text.windows(model, tokenizer, own_text.Wishes(1, 513), quiet)


def test_logits_that_are_not_finite(checkpoint, tokenizer):
    model = source_model.load(str(checkpoint))
    model.model.norm.weight = mx.full(model.model.norm.weight.shape, mx.nan)
    with pytest.raises(SpqtError, match="not finite"):
        own_text.windows(model, tokenizer, own_text.Wishes(2, 8), quiet)


def test_repetitive_texts_are_written_anew(model, tokenizer, monkeypatch):
    stuck = []

    def write(_, begun, length, seed, on_step):
        on_step(length - 1)
        stuck.append(len(begun))
        rows = np.tile(np.arange(length, dtype=np.int32), (len(begun), 1))
        if len(stuck) == 1:
            rows[1:3] = 7
        return rows

    monkeypatch.setattr(own_text, "_write", write)
    seen = []
    found = own_text.windows(model, tokenizer, own_text.Wishes(5, 40), lambda *each: seen.append(each))
    assert stuck[:2] == [5, 2]
    assert sum(stuck) == 7
    assert not any(own_text.repeats_itself(row) for row in found)
    assert "2 repetitive texts" in seen[-1][2]


def test_large_counts_are_written_in_even_groups(model, tokenizer, monkeypatch):
    monkeypatch.setattr(own_text, "AT_ONCE", 4)
    seen = []
    found = own_text.windows(
        model, tokenizer, own_text.Wishes(6, 12), lambda done, total, _: seen.append(done / total)
    )
    assert own_text._at_once(model, 12, 6) == 3
    assert not np.array_equal(found[:3], found[3:])
    assert seen == sorted(seen)


def test_eight_bits_write_text_too(checkpoint, tokenizer):
    opened = source_model.open_source(str(checkpoint))
    model = source_model.build(opened, source_model.eight_bits(opened))
    assert source_model.settings_of(model)
    found = own_text.windows(model, tokenizer, own_text.Wishes(2, 16), quiet)
    assert found.shape == (2, 16)


@pytest.mark.parametrize("extension", [True, False])
def test_what_runs_on_the_cpu_in_place_of_mlx_gives_its_logits(checkpoint, extension, monkeypatch):
    """Through 40 steps of a cache; weights in 8 bits, where the extension has them, are off by about 1 %."""
    monkeypatch.setattr(many_texts.cpu, "status", lambda: (extension and RUNS, ""))
    monkeypatch.setattr(many_texts, "SMALL_PRODUCT", 64)  # attention in several pieces
    model = source_model.load(str(checkpoint))
    plain = dict(model.named_modules())
    tokens = np.random.default_rng(0).integers(5, VOCAB, (3, 40))
    expected = np.array(model(mx.array(tokens)))
    cache, rows = own_text._cache(model), []
    with many_texts.many_texts(model):
        for place in range(40):
            rows.append(np.array(model(mx.array(tokens[:, place : place + 1]), cache=cache)))
    off = np.std(np.concatenate(rows, axis=1) - expected) / np.std(expected)
    assert off < (0.03 if extension else 1e-5)
    assert dict(model.named_modules()) == plain  # its own layers are back


def test_a_random_token_comes_after_the_tokenizers_own_bos(tokenizer, monkeypatch):
    monkeypatch.setattr(starts.texts, "opening", lambda _: [1])
    found = starts.starts(tokenizer, VOCAB, 10, 0)
    assert [len(one) for one in found[::5]] == [2, 2]
    assert {one[0] for one in found[::5]} == {1}
