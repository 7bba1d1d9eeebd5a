"""The vocabulary in a .gguf file's metadata: tokens, their types, scores and merges, ids and flags.

Owns the reading and checking of the keys `tokenizer.*`. Builds no tokenizer.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from spqt_cli.convert.gguf.file import Header
from spqt_cli.errors import AGAIN, SpqtError, UnsupportedError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # where the keys are missing: the format's rule
KEY = "tokenizer.ggml."

# Keys that this reader uses, and keys that are known not to change what a text becomes.
IDS = ("bos", "eos", "unknown", "padding", "eot", "eom")
FLAGS = ("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces")
USED = {"model", "pre", "tokens", "token_type", "scores", "merges", *FLAGS, *(f"{n}_token_id" for n in IDS)}
HARMLESS = {
    *("seperator_token_id", "mask_token_id", "cls_token_id", "prefix_token_id", "suffix_token_id"),
    *("middle_token_id", "fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id", "fim_pad_token_id"),
    *("fim_rep_token_id", "fim_sep_token_id"),
}
NEUTRAL: dict[str, Any] = {"add_sep_token": False, "escape_whitespaces": True, "token_type_count": 1}
OTHER = ("tokenizer.chat_template", "tokenizer.huggingface.json")  # templates; a copy of the original


@dataclass(frozen=True)
class Vocabulary:
    """What a .gguf file says of its tokenizer.

    kind, pre: tokenizer.ggml.model and .pre. types: int32 [tokens]. scores: float32 [tokens] or None.
    ids: by "bos", "eos", "unknown", "padding", "eot", "eom", those that the file has.
    """

    kind: str
    pre: str | None
    tokens: list[str]
    types: np.ndarray
    scores: np.ndarray | None
    merges: list[tuple[str, str]] | None
    ids: dict[str, int]
    flags: dict[str, bool]

    def of_type(self, *types: int) -> list[int]:
        """The ids of the tokens of these types, ascending."""
        return [int(i) for i in np.flatnonzero(np.isin(self.types, types))]

    def token(self, name: str) -> str | None:
        """The special token of that name."""
        return self.tokens[self.ids[name]] if name in self.ids else None


def read_vocabulary(header: Header) -> Vocabulary:
    """The checked vocabulary of a file."""
    refuse_unknown_keys(header)
    values = {k.removeprefix(KEY): v for k, v in header.metadata.items() if k.startswith(KEY)}
    tokens = values.get("tokens")
    if not isinstance(tokens, list) or not tokens:
        raise SpqtError(f"{header.path} lacks {KEY}tokens", "use a file that holds its vocabulary")
    if len(set(tokens)) != len(tokens):
        raise SpqtError(f"{header.path}: {KEY}tokens names a token twice", AGAIN)
    types = _numbers(header, values.get("token_type"), "token_type", len(tokens))
    return Vocabulary(
        kind=str(values.get("model")),
        pre=values.get("pre"),
        tokens=tokens,
        types=np.full(len(tokens), NORMAL) if types is None else types,
        scores=_numbers(header, values.get("scores"), "scores", len(tokens)),
        merges=_merges(header, values.get("merges")),
        ids=_ids(header, values, len(tokens)),
        flags=_flags(header, values),
    )


def refuse_unknown_keys(header: Header) -> None:
    """Refuse a key of the tokenizer that is neither used nor known to be harmless."""
    for key, value in header.metadata.items():
        if not key.startswith("tokenizer.") or key.startswith(OTHER):
            continue
        part = key.removeprefix(KEY)
        if part in USED or part in HARMLESS or _is_neutral(part, value):
            continue
        raise UnsupportedError(
            f"{header.path} has the tokenizer key {key}, which spqt does not know",
            "it may change the tokens, so it is not skipped",
        )


def _is_neutral(part: str, value: Any) -> bool:
    if part == "precompiled_charsmap":  # an empty table normalizes nothing
        return isinstance(value, list | np.ndarray) and len(value) == 0
    return part in NEUTRAL and not isinstance(value, list | np.ndarray) and value == NEUTRAL[part]


def _numbers(header: Header, value: Any, key: str, count: int) -> np.ndarray | None:
    if value is None:
        return None
    if not isinstance(value, np.ndarray) or len(value) != count or not np.all(np.isfinite(value)):
        raise SpqtError(f"{header.path}: {KEY}{key} does not hold a number for each of {count} tokens", AGAIN)
    return value


def _merges(header: Header, value: Any) -> list[tuple[str, str]] | None:
    if value is None:
        return None
    merges = [tuple(m.split(" ")) for m in value] if isinstance(value, list) else [()]
    if any(len(pair) != 2 for pair in merges):
        raise SpqtError(f"{header.path}: {KEY}merges holds an entry that is not two tokens", AGAIN)
    return [(first, second) for first, second in merges]


def _flags(header: Header, values: dict[str, Any]) -> dict[str, bool]:
    flags = {key: values[key] for key in FLAGS if key in values}
    for key, value in flags.items():
        if type(value) is not bool:
            raise SpqtError(f"{header.path}: {KEY}{key} is not true or false", AGAIN)
    return flags


def _ids(header: Header, values: dict[str, Any], count: int) -> dict[str, int]:
    ids = dict(SENTENCEPIECE_IDS) if values.get("model") == "llama" else {}
    for name in IDS:
        value = values.get(f"{name}_token_id")
        if value is not None:
            ids[name] = value
    for name, value in ids.items():
        if type(value) is not int or not 0 <= value < count:
            raise SpqtError(f"{header.path}: {KEY}{name}_token_id is {value!r} of {count} tokens", AGAIN)
    return ids
