"""Byte-level BPE from a .gguf file (`tokenizer.ggml.model` "gpt2"): merges, and text cut by `.pre`.

Owns the table of pre-tokenizers. A name that is not in it is refused: a text cut otherwise gives other
tokens, and nothing would tell.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spqt_cli.convert.gguf.vocabulary import Vocabulary
from spqt_cli.errors import AGAIN, SpqtError, UnsupportedError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")  # one digit at a time


@dataclass(frozen=True)
class Pre:
    """How a pre-tokenizer cuts text.

    split: its regular expression, or None for GPT-2's. digits: each digit alone, before that.
    composes: Unicode NFC first. whole: a piece that is a token needs no merges. bos: a beginning token
    where add_bos_token is missing.
    """

    split: str | None = None
    digits: bool = False
    composes: bool = False
    whole: bool = False
    bos: bool = False


GPT2 = Pre()
LLAMA3 = Pre(split=LLAMA3_SPLIT, whole=True, bos=True)
PRES = {
    "default": GPT2,
    "gpt-2": GPT2,
    "llama-bpe": LLAMA3,
    "llama-v3": LLAMA3,
    "llama3": LLAMA3,
    "qwen2": Pre(split=QWEN2_SPLIT, composes=True),
    "smollm": Pre(digits=True),
}


def find_pre(path: Path, pre: object) -> Pre:
    """The pre-tokenizer of that name; refused unless it is known."""
    if not isinstance(pre, str):
        raise UnsupportedError(
            f"{path} has no tokenizer.ggml.pre, so its text can't be cut as its model learned it",
            "use a file of a converter after April 2024",
        )
    if pre not in PRES:
        known = ", ".join(PRES)
        raise UnsupportedError(f"{path} has the pre-tokenizer {pre[:40]!r}", f"spqt knows {known}")
    return PRES[pre]


def build(path: Path, vocabulary: Vocabulary, pre: Pre) -> "Tokenizer":
    """The tokenizer, without its added tokens and without bos and eos."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if vocabulary.merges is None:
        raise SpqtError(f"{path} lacks tokenizer.ggml.merges", AGAIN)
    table = {token: i for i, token in enumerate(vocabulary.tokens)}
    try:
        model = models.BPE(table, vocabulary.merges, ignore_merges=pre.whole)
    except Exception as error:  # the library raises bare Exception
        raise SpqtError(f"{path}: its merges don't fit its tokens ({error})", AGAIN) from None
    tokenizer = Tokenizer(model)
    prefix = vocabulary.flags.get("add_space_prefix", False)
    if pre.composes:
        tokenizer.normalizer = normalizers.NFC()
    cuts: list = [pre_tokenizers.Digits(individual_digits=True)] if pre.digits else []
    if pre.split:
        cuts.append(pre_tokenizers.Split(Regex(pre.split), behavior="isolated"))
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=pre.split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts) if len(cuts) > 1 else cuts[0]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
