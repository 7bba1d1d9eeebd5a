"""The first tokens of texts that a model is to write itself, in four kinds.

It knows tokenizers and the openings that ship with spqt (`configs/openings.txt`), and no models.
"""

import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np

from spqt_cli.decode import text_borders
from spqt_cli.measure import texts
from spqt_cli.system import sandbox

SEPARATES_DOCUMENTS = (
    "<|endoftext|>"  # in GPT-2's vocabulary and its many heirs, whatever they call their BOS
)
_WORDS = "SPQT0WORDS"  # stands for what a user says
_NO_TEXT = re.compile(r"[<\[].*[>\]]")  # special tokens, unused ones, and tags, which are no loss
OPENINGS_EACH = 2  # for a round of other kinds, which are three at most
_BETWEEN = "<|document|>\n"


def starts(
    tokenizer: Any, vocabulary: int, count: int, seed: int, openings_each: int = OPENINGS_EACH
) -> list[list[int]]:
    """`count` starts of at least one token each: the kinds that the tokenizer has, in turn.

    For each round of a random token, a chat turn and a document, or of those that there are, come
    `openings_each` openings, in an order that the seed gives: fitted on 64 windows of SmolLM2, thirds without
    openings gave a KL of .127 on WikiText and .166 on text of many kinds, a third of openings .131 and .153.
    A random token comes after what the tokenizer puts before any text: Gemma-3-270M repeats itself without.
    vocabulary: the model's number of tokens; kinds that need others are left out.
    """
    random = np.random.default_rng([seed, 1])
    words, before = _words(tokenizer, vocabulary), texts.opening(tokenizer)
    chat, document = chat_turn(tokenizer), document_start(tokenizer)
    opened = [tokens for tokens in openings(tokenizer) if max(tokens) < vocabulary]
    order = [opened[place] for place in random.permutation(len(opened))]
    kinds = [None, *(one for one in (chat, document) if _known(one, vocabulary))]  # None: a random token
    each = openings_each if order else 0
    found: list[list[int]] = []
    used = 0  # openings
    while len(found) < count:
        for number, kind in enumerate(kinds):
            found.append([*before, int(random.choice(words))] if kind is None else kind)
            # spread over the round
            more = round(each * (number + 1) / len(kinds)) - round(each * number / len(kinds))
            found += [order[place % len(order)] for place in range(used, used + more)]
            used += more
    return found[:count]


def _known(tokens: Sequence[int], vocabulary: int) -> bool:
    return bool(tokens) and max(tokens) < vocabulary


def chat_turn(tokenizer: Any) -> list[int]:
    """The chat template up to where a user's words begin, so that a model writes question and answer.

    Empty where there is no template, or none from which that place can be told.
    """
    if not getattr(tokenizer, "has_chat_template", False):
        return []
    turns = [{"role": "user", "content": _WORDS}]
    try:
        with sandbox.bounded("the model's chat template"):
            text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # a template is the model's code: it may raise anything
        return []
    before, words, _ = text.partition(_WORDS)
    return list(tokenizer.encode(before, add_special_tokens=False)) if words else []


def document_start(tokenizer: Any) -> list[int]:
    """What stands before a document: what the tokenizer puts there, else what separates documents.

    That is SEPARATES_DOCUMENTS, else the BOS, else the EOS; empty for a tokenizer that has none.
    """
    others = (tokenizer.get_vocab().get(SEPARATES_DOCUMENTS), tokenizer.bos_token_id, tokenizer.eos_token_id)
    return texts.opening(tokenizer) or next(([int(one)] for one in others if one is not None), [])


def openings(tokenizer: Any) -> list[list[int]]:
    """The openings that ship with spqt, each as the tokenizer begins a prompt with it."""
    shipped = (resources.files("spqt_cli.configs") / "openings.txt").read_text(encoding="utf-8")
    found = [part.removesuffix("\n") for part in shipped.split(_BETWEEN)]
    return [tokens for tokens in (text_borders.encode(tokenizer, text) for text in found) if tokens]


def _words(tokenizer: Any, vocabulary: int) -> np.ndarray:
    """The tokens to choose a random one from: (count,), in order; all of them if none looks like text."""
    special = set(tokenizer.all_special_ids)
    found = sorted(
        token
        for text, token in tokenizer.get_vocab().items()
        if token < vocabulary and token not in special and not _NO_TEXT.fullmatch(text)
    )
    return np.array(found or range(vocabulary))
