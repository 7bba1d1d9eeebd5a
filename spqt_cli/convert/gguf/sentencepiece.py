"""SentencePiece BPE from a .gguf file (`tokenizer.ggml.model` "llama"), rebuilt in `tokenizers`.

SentencePiece joins the neighbours whose union is the piece of the highest score. `tokenizers` wants the
same as ranked pairs, so each piece is cut at every place where both parts are pieces too.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spqt_cli.convert.gguf.file import ORIGINAL
from spqt_cli.convert.gguf.vocabulary import BYTE, NORMAL, UNUSED, USER_DEFINED, Vocabulary
from spqt_cli.errors import AGAIN, SpqtError, UnsupportedError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "▁"
LONGEST_PIECE = 512  # characters; SentencePiece trains pieces of 16, Gemma's runs of spaces have 31


def check(path: Path, vocabulary_kind: str, pre: object) -> None:
    """Refuse a pre-tokenizer: SentencePiece has none."""
    if pre not in (None, "default"):
        raise UnsupportedError(
            f"{path} has the pre-tokenizer {str(pre)[:40]!r} with {vocabulary_kind!r}", ORIGINAL
        )


def changes_only_spaces(vocabulary: Vocabulary) -> bool:
    """True if normalizing turns each space into its sign and does nothing else.

    Then user-defined tokens can be added tokens. Otherwise `tokenizers` would normalize the text between
    them, and their own, as texts of their own, each with a prefix.
    """
    return not (_prefixed(vocabulary) or _trimmed(vocabulary))


def build(path: Path, vocabulary: Vocabulary) -> "Tokenizer":
    """The tokenizer, without its added tokens and without bos and eos."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokens = spelled(vocabulary)
    fixed = [] if changes_only_spaces(vocabulary) else [tokens[i] for i in vocabulary.of_type(USER_DEFINED)]
    table = {token: i for i, token in enumerate(tokens)}
    merges = _merges(path, vocabulary, tokens)
    try:
        model = models.BPE(
            table,
            merges,
            unk_token=vocabulary.token("unknown"),
            fuse_unk=True,
            byte_fallback=bool(vocabulary.of_type(BYTE)),
            ignore_merges=bool(fixed),  # a user-defined token stands alone by then, and has no merges
        )
    except Exception as error:  # the library raises bare Exception
        raise SpqtError(f"{path}: its pieces don't fit together ({error})", AGAIN) from None
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = _normalizer(vocabulary)
    if fixed:
        longest_first = sorted(fixed, key=len, reverse=True)
        pattern = "|".join(re.escape(token) for token in longest_first)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if _prefixed(vocabulary):
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def spelled(vocabulary: Vocabulary) -> list[str]:
    """The tokens as `tokenizers` has to look them up: with SentencePiece's sign for spaces.

    Converters write a user-defined token's spaces as they are.
    """
    tokens = list(vocabulary.tokens)
    known = set(tokens)
    for i in vocabulary.of_type(USER_DEFINED):
        respelled = tokens[i].replace(" ", SPACE)
        if respelled not in known:
            tokens[i] = respelled
    return tokens


def _prefixed(vocabulary: Vocabulary) -> bool:
    return vocabulary.flags.get("add_space_prefix", True)


def _trimmed(vocabulary: Vocabulary) -> bool:
    return vocabulary.flags.get("remove_extra_whitespaces", False)


def _normalizer(vocabulary: Vocabulary) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if _trimmed(vocabulary):
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", SPACE))
    if _trimmed(vocabulary):
        steps.append(normalizers.Replace(Regex(SPACE + r"+\z"), ""))
    if _prefixed(vocabulary):
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence(steps)


def _merges(path: Path, vocabulary: Vocabulary, tokens: list[str]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best first."""
    scores = vocabulary.scores
    pieces = {tokens[i]: i for i in vocabulary.of_type(NORMAL)}
    _refuse_joined_unused(path, vocabulary, pieces)
    long = [i for piece, i in pieces.items() if len(piece) > 1]
    if scores is None or (len(long) > 1 and np.all(scores[long] == scores[long[0]])):
        if vocabulary.merges is None:
            raise SpqtError(f"{path}: its scores don't say which pieces to join first", AGAIN)
        return vocabulary.merges
    ranked = []
    for piece, i in pieces.items():
        score = -float(scores[i])
        # Pairs of one piece have one score; the longer left part first is what a run of one sign needs.
        ranked += [(score, i, -cut, left, right) for cut, left, right in _cuts(path, piece, pieces)]
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _cuts(path: Path, piece: str, pieces: dict[str, int]) -> list[tuple[int, str, str]]:
    """Where a piece falls into two pieces: length of the left one, left, right."""
    if len(piece) > LONGEST_PIECE:
        raise SpqtError(f"{path} has a token of {len(piece)} characters", AGAIN)
    cuts = ((n, piece[:n], piece[n:]) for n in range(1, len(piece)))
    return [cut for cut in cuts if cut[1] in pieces and cut[2] in pieces]


def _refuse_joined_unused(path: Path, vocabulary: Vocabulary, pieces: dict[str, int]) -> None:
    """SentencePiece joins an unused piece and takes it apart again; `tokenizers` can't."""
    for i in vocabulary.of_type(UNUSED):
        if _cuts(path, vocabulary.tokens[i], pieces):
            raise UnsupportedError(
                f"{path} marks the piece {vocabulary.tokens[i]!r} unused, but joins it", ORIGINAL
            )
