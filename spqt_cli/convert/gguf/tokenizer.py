"""The tokenizer in a .gguf file, written as the files that transformers and mlx-lm load.

Owns the choice by `tokenizer.ggml.model`, the special and added tokens, the chat template and the ids
that end a text. transformers' own reader of such files needs torch, so nothing of it is used.
"""

import json
from pathlib import Path
from typing import Any

from spqt_cli.convert.gguf import bpe, sentencepiece
from spqt_cli.convert.gguf.file import Header
from spqt_cli.convert.gguf.vocabulary import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    read_vocabulary,
    refuse_unknown_keys,
)
from spqt_cli.errors import AGAIN, SpqtError, UnsupportedError
from spqt_cli.system import files

TEMPLATE = "tokenizer.chat_template"
NAMED_TEMPLATE = TEMPLATE + "."
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# Tokens that end a turn. A file may name only the one that ends a text; a template that writes one of
# these makes it an end too.
TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")


def check(header: Header) -> None:
    """Refuse a tokenizer that spqt can't rebuild, from its kind, pre-tokenizer and keys alone."""
    refuse_unknown_keys(header)
    kind, pre = (header.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind == "gpt2":
        bpe.find_pre(header.path, pre)
    elif kind == "llama":
        sentencepiece.check(header.path, kind, pre)
    else:
        found = "no tokenizer" if kind is None else f"the tokenizer kind {str(kind)[:40]!r}"
        raise UnsupportedError(f"{header.path} has {found}", "spqt knows 'gpt2' and 'llama'")


def check_builds(header: Header, rows: int) -> None:
    """Refuse a vocabulary that makes no tokenizer, or has more tokens than the embedding has rows."""
    vocabulary = read_vocabulary(header)
    if len(vocabulary.tokens) > rows:
        raise SpqtError(
            f"{header.path} has {len(vocabulary.tokens)} tokens and an embedding of {rows} rows", AGAIN
        )
    _template(header)
    _tokenizer(header, vocabulary)


def special_ids(header: Header) -> dict[str, Any]:
    """bos, eos and pad ids for config.json; eos is a list where several tokens end a text."""
    vocabulary = read_vocabulary(header)
    ends = _ends(header, vocabulary)
    return {
        "bos_token_id": vocabulary.ids.get("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": vocabulary.ids.get("padding"),
    }


def write(header: Header, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json."""
    check(header)
    vocabulary = read_vocabulary(header)
    context = header.metadata.get(f"{header.metadata['general.architecture']}.context_length")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({"model_max_length": context} if type(context) is int else {}),
        "clean_up_tokenization_spaces": False,
        **{role: vocabulary.token(name) for role, name in ROLES.items()},
    }
    template = _template(header)
    if isinstance(template, list):
        settings["chat_template"] = template
    elif template is not None:
        files.write_text(folder / "chat_template.jinja", template)
    ids = {key: value for key, value in special_ids(header).items() if value is not None}
    contents = {
        "tokenizer.json": _tokenizer(header, vocabulary),
        "tokenizer_config.json": settings,
        "generation_config.json": ids,
    }
    for name, content in contents.items():
        files.write_text(folder / name, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def _tokenizer(header: Header, vocabulary: Vocabulary) -> dict[str, Any]:
    """tokenizer.json as an object."""
    from tokenizers import AddedToken

    if vocabulary.kind == "gpt2":
        pre = bpe.find_pre(header.path, vocabulary.pre)
        tokenizer, tokens = bpe.build(header.path, vocabulary, pre), vocabulary.tokens
        literal, adds_bos = vocabulary.of_type(USER_DEFINED), pre.bos
    else:
        tokenizer, tokens = (
            sentencepiece.build(header.path, vocabulary),
            sentencepiece.spelled(vocabulary),
        )
        literal, adds_bos = [], True
        if sentencepiece.changes_only_spaces(vocabulary):
            literal = vocabulary.of_type(USER_DEFINED)
    roles = {vocabulary.ids[name] for name in ROLES.values() if name in vocabulary.ids}
    special = sorted(roles.union(vocabulary.of_type(CONTROL, UNKNOWN)))
    tokenizer.add_special_tokens([AddedToken(tokens[i], normalized=False, special=True) for i in special])
    others = [i for i in literal if i not in set(special)]
    # SentencePiece looks for them in the normalized text, byte-level BPE in the raw one.
    normalized = vocabulary.kind == "llama"
    tokenizer.add_tokens([AddedToken(tokens[i], normalized=normalized, special=False) for i in others])
    built = json.loads(tokenizer.to_str())
    built["post_processor"] = _frame(header, vocabulary, adds_bos)
    return built


def _frame(header: Header, vocabulary: Vocabulary, adds_bos: bool) -> dict[str, Any]:
    """The post-processor that puts bos before and eos after a text, as the file's flags say."""
    parts: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
    known = {}
    for name, side, default in (("bos", "before", adds_bos), ("eos", "after", False)):
        if not vocabulary.flags.get(f"add_{name}_token", default):
            continue
        token = vocabulary.token(name)
        if token is None:
            raise SpqtError(f"{header.path} adds a {name} token but has no {name}_token_id", AGAIN)
        parts[side].append({"SpecialToken": {"id": token, "type_id": 0}})
        known[token] = {"id": token, "ids": [vocabulary.ids[name]], "tokens": [token]}
    first, second = ({"Sequence": {"id": letter, "type_id": i}} for i, letter in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [*parts["before"], first, *parts["after"]],
        "pair": [*parts["before"], first, *parts["after"], *parts["before"], second, *parts["after"]],
        "special_tokens": known,
    }


def _template(header: Header) -> str | list[dict[str, str]] | None:
    """The chat template; a list of named ones where the file has more than the default."""
    named = {"default": header.metadata.get(TEMPLATE)}
    for key, value in header.metadata.items():
        if key.startswith(NAMED_TEMPLATE):
            named[key.removeprefix(NAMED_TEMPLATE)] = value
    named = {name: text for name, text in named.items() if text is not None}
    if not all(isinstance(text, str) for text in named.values()):
        raise SpqtError(f"{header.path}: {TEMPLATE} is not a string", AGAIN)
    if set(named) <= {"default"}:
        return named.get("default")
    return [{"name": name, "template": str(text)} for name, text in named.items()]


def _ends(header: Header, vocabulary: Vocabulary) -> list[int]:
    """The ids that end a text, the file's own first."""
    ids = [vocabulary.ids[name] for name in ("eos", "eot", "eom") if name in vocabulary.ids]
    template = header.metadata.get(TEMPLATE)
    if isinstance(template, str):
        written = {token for token in TURN_ENDS if token in template}
        ids += [i for i in vocabulary.of_type(CONTROL, USER_DEFINED) if vocabulary.tokens[i] in written]
    return list(dict.fromkeys(ids))
