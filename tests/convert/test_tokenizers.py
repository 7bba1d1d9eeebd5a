"""What is loaded from a converted folder is tokenizer.json, one BOS stands before a text, and an answer's
text begins where the prompt's ends. The tokenizers are put together here."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from spqt_cli.convert import convert, tokenizer_fidelity, tokenizer_files
from spqt_cli.decode import generate, session, text_borders
from spqt_cli.decode.options import Options, Prompt, Sampling
from spqt_cli.errors import SpqtError, UnsupportedError
from spqt_cli.evaluate import compare
from spqt_cli.measure import texts
from tests.conftest import tiny_checkpoint
from tests.convert.gguf.test_tokenizer import write_bpe
from tests.lib.converting import OPTIONS, contents, run

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("1", "2"), ("12", "3"), ("Ġ", "Ġ"), ("Ċ", "Ċ"), ("'", "t"), ("a", "b"), ("ab", "c"), ("Ġ", "x")]
SPECIAL = ["<|end|>", "<|bos|>"]
LINE = "it 1234 isn't\n\n  abc<|end|> x"


def byte_level(**parts: Any) -> Tokenizer:
    """Bytes and a few merges, each digit alone, BOS before a text; `parts` take the place of its own."""
    tokens = [*ALPHABET, *("".join(pair) for pair in MERGES)]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, MERGES))
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    bos = ("<|bos|>", made.token_to_id("<|bos|>"))
    made.post_processor = processors.TemplateProcessing("<|bos|> $A", None, [bos])
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def pieces(*words: str, strips: bool = True) -> Tokenizer:
    """SentencePiece-like: a sign for spaces, one put before a text, bytes for what has no piece."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, "▁", *"abcdefgh\n", *words]
    table = {token: i for i, token in enumerate(tokens)}
    merges = [(word[:-1], word[-1]) for word in words]
    made = Tokenizer(models.BPE(table, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strips else [])])
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens[:3]])
    made.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return made


def checkpoint(folder: Path, arch: str, truth: Tokenizer, settings: dict[str, Any] | None) -> Path:
    """A tiny checkpoint with this tokenizer; settings None leaves tokenizer_config.json out."""
    tiny_checkpoint(folder, arch)
    truth.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").unlink()
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def loaded_by_mlx_lm(folder: Path, **flags: Any) -> Any:
    from mlx_lm import utils

    return utils.load_tokenizer(folder, flags)


def kept(folder: Path, truth: Tokenizer, line: str = LINE, **flags: Any) -> Any:
    """The tokenizer of a folder, which must give what `truth` gives."""
    found = loaded_by_mlx_lm(folder, **flags)
    for framed in (False, True):
        ids = truth.encode(line, add_special_tokens=framed).ids
        assert found.encode(line, add_special_tokens=framed) == ids
        assert found.decode(ids) == truth.decode(ids, skip_special_tokens=False)
    return found


NAMES = {"eos_token": "<|end|>", "bos_token": "<|bos|>", "chat_template": "{{ messages[0].content }}"}


@pytest.mark.parametrize(
    ("arch", "named"),
    [
        *(("llama", f"{name}Tokenizer") for name in ("GPT2", "Cohere", "GPTNeoX", "Gemma", "Qwen2")),
        ("qwen2", "Qwen2Tokenizer"),
        ("qwen2", "PreTrainedTokenizerFast"),
        ("gemma3", "GemmaTokenizerFast"),
        ("gemma3", None),
    ],
)
def test_a_class_that_cuts_otherwise(tmp_path: Path, arch: str, named: str | None) -> None:
    composed = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[^\p{N}]+"), behavior="isolated")  # no class has it
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    truth = byte_level(pre_tokenizer=pre_tokenizers.Sequence([composed, level]))
    settings = {**NAMES, **({"tokenizer_class": named} if named else {})}
    source = checkpoint(tmp_path / "source", arch, truth, settings)
    try:  # the test shows something only where the class itself is wrong, or fails
        assert loaded_by_mlx_lm(source).encode(LINE) != truth.encode(LINE).ids
    except Exception as error:
        assert "Unk token" in str(error)  # noqa: PT017
    result = convert.convert(str(source), tmp_path / "out", OPTIONS)
    assert len([one for one in result.warnings if "tokenizer.json" in one]) == 1
    found = kept(tmp_path / "out", truth)
    kept(tmp_path / "out", truth, trust_remote_code=False)
    kept(tmp_path / "out", truth, trust_remote_code=True)
    assert (found.bos_token, found.eos_token, found.chat_template) == (
        "<|bos|>",
        "<|end|>",
        settings["chat_template"],
    )
    written = contents(tmp_path / "out")
    assert written["tokenizer.json"] == (source / "tokenizer.json").read_bytes()
    assert b"auto_map" not in written["tokenizer_config.json"]


@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "TokenizersBackend"])
def test_settings_that_keep_it_stay_as_they_are(tmp_path: Path, named: str) -> None:
    settings = {**NAMES, "tokenizer_class": named}
    source = checkpoint(tmp_path / "source", "llama", byte_level(), settings)
    assert convert.convert(str(source), tmp_path / "out", OPTIONS).warnings == []
    written = contents(tmp_path / "out")["tokenizer_config.json"]
    assert written == (source / "tokenizer_config.json").read_bytes()


def test_special_tokens_that_only_the_class_names(tmp_path: Path) -> None:
    """GPT2Tokenizer's own BOS and EOS stay when its cuts go."""
    truth = byte_level()
    truth.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    source = checkpoint(tmp_path / "source", "llama", truth, {"tokenizer_class": "GPT2Tokenizer"})
    before = loaded_by_mlx_lm(source)
    run(source, tmp_path / "out")
    found = kept(tmp_path / "out", truth)
    assert found.eos_token == before.eos_token == "<|endoftext|>"
    assert found.bos_token_id == before.bos_token_id
    assert len(found) == len(before)


def test_flags_of_added_tokens_are_those_of_tokenizer_json(tmp_path: Path) -> None:
    truth = byte_level()
    end = truth.token_to_id("<|end|>")
    greedy = {"content": "<|end|>", "lstrip": True, "rstrip": True, "normalized": False, "single_word": False}
    extra = {
        "content": "<|more|>",
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
    }
    settings = {
        **NAMES,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            str(end): {**greedy, "special": True},
            str(end + 2): {**extra, "special": True},
        },
    }
    source = checkpoint(tmp_path / "source", "llama", truth, settings)
    line = "a <|end|> b"
    assert loaded_by_mlx_lm(source).encode(line) != truth.encode(line).ids
    run(source, tmp_path / "out")
    found = kept(tmp_path / "out", truth, line)
    assert found.convert_tokens_to_ids("<|more|>") == end + 2  # what only the settings have is not lost


@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2Tokenizer", None])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_specials_that_only_the_settings_call_special(tmp_path: Path, arch: str, named: str | None) -> None:
    """BOS and EOS are entries of the vocabulary, and tokenizer.json lists no added tokens."""
    tokens = [*ALPHABET, *("".join(pair) for pair in MERGES), *SPECIAL]
    truth = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, MERGES))
    digits = pre_tokenizers.Digits(individual_digits=True)
    truth.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    truth.decoder = decoders.ByteLevel()
    settings = {**NAMES, **({"tokenizer_class": named} if named else {})}
    source = checkpoint(tmp_path / "source", arch, truth, settings)
    run(source, tmp_path / "out")
    found = kept(tmp_path / "out", truth, "it 1234 isn't\n\n  abc x")
    assert found.encode("a<|end|>", add_special_tokens=False) == [*truth.encode("a").ids, found.eos_token_id]
    assert found.eos_token_id == truth.token_to_id("<|end|>")


def test_specials_that_only_the_settings_have(tmp_path: Path) -> None:
    truth = byte_level()
    more = ["[INST]", "[/INST]"]  # one of the hard lines spells them
    settings = {**NAMES, "additional_special_tokens": more, "tokenizer_class": "PreTrainedTokenizerFast"}
    source = checkpoint(tmp_path / "source", "llama", truth, settings)
    assert convert.convert(str(source), tmp_path / "out", OPTIONS).warnings == []
    found = kept(tmp_path / "out", truth)
    first = truth.get_vocab_size()
    assert found.encode("[INST][/INST]", add_special_tokens=False) == [first, first + 1]


def test_limits_in_tokenizer_json_bind_nobody(tmp_path: Path) -> None:
    truth = byte_level()
    truth.enable_truncation(8)
    truth.enable_padding(length=16)
    settings = {**NAMES, "tokenizer_class": "PreTrainedTokenizerFast"}
    source = checkpoint(tmp_path / "source", "llama", truth, settings)
    assert convert.convert(str(source), tmp_path / "out", OPTIONS).warnings == []


def test_a_difference_that_nothing_mends_is_refused(tmp_path: Path) -> None:
    """A setting that takes special tokens for plain text: no class helps."""
    settings = {**NAMES, "split_special_tokens": True, "tokenizer_class": "PreTrainedTokenizerFast"}
    source = checkpoint(tmp_path / "source", "llama", byte_level(), settings)
    for options in (OPTIONS, convert.ConvertOptions(dry_run=True)):
        with pytest.raises(UnsupportedError, match=r"another tokenizer.*<\|end\|>"):
            convert.convert(str(source), tmp_path / "out", options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]  # before any work


def test_a_tokenizer_that_does_not_load_is_refused_in_a_line(tmp_path: Path) -> None:
    settings = {**NAMES, "tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {"x": 1}}
    source = checkpoint(tmp_path / "source", "llama", byte_level(), settings)
    with pytest.raises(SpqtError, match="can't be loaded"):
        convert.convert(str(source), tmp_path / "out", OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_class_of_mlx_lms_own_is_asked_for(tmp_path: Path) -> None:
    """Its newlines are tokens <n>, of which tokenizer.json knows nothing."""
    settings = {**NAMES, "tokenizer_class": "NewlineTokenizer"}
    source = checkpoint(tmp_path / "source", "llama", byte_level(), settings)
    assert convert.convert(str(source), tmp_path / "out", OPTIONS).warnings == []
    assert type(loaded_by_mlx_lm(tmp_path / "out")._tokenizer).__name__ == "NewlineTokenizer"


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "gpt-2"])
def test_a_gguf_file_of_qwen2_keeps_its_own_cuts(tmp_path: Path, pre: str) -> None:
    from spqt_cli.convert.source import Checkpoint

    path = write_bpe(tmp_path, pre, "qwen2")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    opened = type("Opened", (), {"path": path, "files": lambda self: [path]})()
    found = Checkpoint(path.name, tmp_path, {}, {}, gguf=opened)
    said = tokenizer_files.write(found, folder)
    truth = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert said is not None
    assert "tokenizer.json" in said
    assert tokenizer_fidelity.difference(loaded_by_mlx_lm(folder), truth) is None


def test_the_lines_tell_published_ways_to_cut_apart() -> None:
    """Were two of them the same on all lines, the check could not tell a class from tokenizer.json."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def split(pattern: str) -> Any:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), level])

    words, marked = r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
    rest = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ways = [
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
        ),
        split(rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{words}|\p{{N}}|{rest}"),
        split(rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{words}|\p{{N}}{{1,3}}|{rest}"),
        split(rf"'s|'t|{words}|\p{{N}}{{1,3}}|{rest}"),
        split(rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{marked}|\p{{N}}|{rest}"),
    ]
    cuts = [str([way.pre_tokenize_str(line) for line in tokenizer_fidelity.LINES]) for way in ways]
    assert len(set(cuts)) == len(ways)


@pytest.mark.parametrize("text", ["hi", "<|bos|>hi", "<|bos|>", "", " <|bos|>hi", "<|bos|><|bos|>hi"])
def test_one_bos_before_a_text(tmp_path: Path, text: str) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(NAMES))
    tokenizer = loaded_by_mlx_lm(tmp_path)
    bos = tokenizer.bos_token_id
    plain = tokenizer.encode(text, add_special_tokens=False)
    wanted = plain if text.startswith("<|bos|>") else [bos, *plain]
    assert text_borders.encode(tokenizer, text) == wanted
    read = texts.Text("a text", "", (text + "\n",))
    assert texts.tokens(read, tokenizer) == wanted


def test_a_tokenizer_without_bos_adds_none(tmp_path: Path) -> None:
    byte_level(post_processor=processors.ByteLevel()).save(str(tmp_path / "tokenizer.json"))
    for settings in ({}, NAMES):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = loaded_by_mlx_lm(tmp_path)
        assert text_borders.encode(tokenizer, "hi") == tokenizer.encode("hi")
        twice = "<|bos|><|bos|>hi"  # as it is written
        assert text_borders.encode(tokenizer, twice) == tokenizer.encode(twice)


KINDS = {
    "byte-level": byte_level(),
    "stripping": pieces("▁a", "▁ab", "▁b"),
    "not stripping": pieces("▁a", "▁ab", "▁b", strips=False),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "answer",
    [
        " bc",
        "bc",
        "  bc",
        "\nbc",
        "\n\n bc ",
        " ",
        "é",
        " 😀😀a",
        "日本",
        "a\u0301 b",
        "</s> a",
        "\ufffd",
        "\ufffdb",
    ],
)
def test_the_text_of_an_answer(tmp_path: Path, kind: str, answer: str) -> None:
    """The pieces together are what decode gives of prompt and answer, less what it gives of the prompt."""
    KINDS[kind].save(str(tmp_path / "tokenizer.json"))
    tokenizer = loaded_by_mlx_lm(tmp_path)
    for prompt in ("a", "a ", "ab 😀", "a\n", "<s>", "d"):
        before = tokenizer.encode(prompt)
        whole = tokenizer.encode(prompt + answer)
        if whole[: len(before)] != before:  # prompt and answer share a token: then the answer is apart
            whole = before + tokenizer.encode(answer, add_special_tokens=False)
        found = text_borders.Answer(tokenizer, before)
        given = [found.push(token) for token in whole[len(before) :]]
        assert not any("\ufffd" in piece for piece in given[:-1]) or "\ufffd" in answer
        text = "".join(given) + found.flush()
        assert tokenizer.decode(before) + text == tokenizer.decode(whole), (prompt, given)
        assert found.flush() == ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_cut_short_is_said_once(tmp_path: Path, kind: str) -> None:
    KINDS[kind].save(str(tmp_path / "tokenizer.json"))
    tokenizer = loaded_by_mlx_lm(tmp_path)
    emoji = tokenizer.encode("😀", add_special_tokens=False)[-4:]
    found = text_borders.Answer(tokenizer, tokenizer.encode("a"))
    given = [found.push(token) for token in [*emoji, *emoji[:2]]]
    assert given == ["", "", "", "😀", "", ""]
    assert set(found.flush()) == {"\ufffd"}


def test_named_templates_go_along(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source")
    inline = json.loads((source / "tokenizer_config.json").read_text())["chat_template"]
    named, outside = source / "additional_chat_templates", tmp_path / "outside.jinja"
    named.mkdir()
    (named / "rag.jinja").write_text("RAG {{ messages[0].content }}")
    (named / "evil.py").write_text("raise SystemExit")
    (named / "deep.jinja").mkdir()
    outside.write_text("OUTSIDE")
    os.symlink(outside, named / "link.jinja")
    written = run(source, tmp_path / "out")
    assert [name for name in written if "/" in name] == ["additional_chat_templates/rag.jinja"]
    loaded = session.load(tmp_path / "out")
    turn = [{"role": "user", "content": "x"}]
    assert loaded.tokenizer.apply_chat_template(turn, tokenize=False, chat_template="rag") == "RAG x"
    assert loaded.tokenizer.chat_template["default"] == inline  # transformers alone would overlook it
    for name, text in (("default", "<|user|>x</s><|assistant|>"), ("rag", "RAG x")):
        asked = Prompt("x", chat_template_config=json.dumps({"chat_template": name}))
        assert generate.encode(loaded, asked) == loaded.tokenizer.encode(text, add_special_tokens=False)


def test_a_folder_of_templates_that_leads_away(tmp_path: Path) -> None:
    source, outside = tiny_checkpoint(tmp_path / "source"), tmp_path / "outside"
    outside.mkdir()
    (outside / "x.jinja").write_text("OUTSIDE")
    os.symlink(outside, source / "additional_chat_templates")
    assert not [name for name in run(source, tmp_path / "out") if "jinja" in name]


def test_a_pipe_among_templates_is_not_waited_for(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    os.mkfifo(source / "additional_chat_templates" / "x.jinja")
    with pytest.raises(SpqtError, match=r"x\.jinja is no file"):
        convert.convert(str(source), tmp_path / "out", OPTIONS)


def scripted(tokens: list[int], end: int | None) -> Any:
    """A stand-in for mlx-lm's loop, which gives these tokens and then the one that ends, if any."""

    def stream(network: Any, tokenizer: Any, prompt: Any, **_: Any) -> Any:
        given = [*tokens, *([] if end is None else [end])]
        for i, token in enumerate(given):
            reason = ("length" if end is None else "stop") if i == len(given) - 1 else None
            step = {"token": token, "generation_tokens": i + 1, "finish_reason": reason, "text": "?"}
            rates = {
                "prompt_tokens": len(prompt),
                "prompt_tps": 1.0,
                "generation_tps": 1.0,
                "peak_memory": 0.0,
            }
            yield SimpleNamespace(**step, **rates, logprobs=mx.zeros(512))

    return stream


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("answer", [" fox jumps", "\nfox", " ", "fox 😀"])
def test_what_is_written_is_the_whole_answer(
    converted: Path, monkeypatch: pytest.MonkeyPatch, answer: str, ends: bool
) -> None:
    """Its first space and its last token, whether a token or the length ends it; in compare as well."""
    loaded = session.load(converted)
    tokens = loaded.tokenizer.encode(answer, add_special_tokens=False)
    end = loaded.tokenizer.eos_token_id if ends else None
    monkeypatch.setattr("mlx_lm.stream_generate", scripted(tokens, end))
    told: list[int] = []
    prompt = generate.encode(loaded, Prompt("the quick", ignore_chat_template=True))
    *given, _ = generate.stream(loaded, prompt, Sampling(), Options(on_token=told.append))
    assert ("".join(given), told) == (answer, tokens)
    *given, _ = generate.stream(loaded, prompt, Sampling(), Options(stop=["zzz"]))
    assert "".join(given) == answer
    (row,) = compare.compare(str(converted), Prompt("the quick"), [0.0])
    assert row.text == answer
    templated = generate.encode(loaded, Prompt("the quick"))
    assert row.perplexity == compare.perplexity(loaded, templated, tokens)
