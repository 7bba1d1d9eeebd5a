"""Bodies: what is wrong is refused by name, what passes is what mlx-lm may be given."""

import json
from typing import Any

import pytest

from spqt_cli.serve import fields
from spqt_cli.serve.refusal import Refusal

SERVED = fields.Served("tiny", frozenset({"./tiny"}), 512, frozenset({"chat_template", "tokenize"}))
CHAT = {"messages": [{"role": "user", "content": "Hello"}]}
TEXT = {"prompt": "Hello"}


def checked(body: Any, route: str = "/v1/completions") -> dict[str, Any]:
    return fields.checked(body if isinstance(body, bytes) else json.dumps(body).encode(), route, SERVED)


def refused(body: Any, route: str = "/v1/completions") -> Refusal:
    with pytest.raises(Refusal) as found:
        checked(body, route)
    return found.value


WRONG: dict[str, list[Any]] = {
    "temperature": [-0.1, 101, "1", True, [], {}],
    "top_p": [0, -1, 1.1, "1", False],
    "min_p": [-0.1, 2, [0.1]],
    "top_k": [-1, 512, 5.0, "5", True],
    "max_tokens": [0, -5, 1.5, "8", 2**40, True],
    "max_completion_tokens": [0, "8", []],
    "repetition_penalty": [-1, 1e-6, 11, "1"],
    "repetition_context_size": [-1, 1.5, 10**9],
    "presence_penalty": [-3, 3, "0"],
    "frequency_penalty": [-3, 3, {}],
    "logprobs": [1, "true", []],
    "top_logprobs": [-1, 12, 2.0, True],
    "seed": [1.5, "1", True, -(2**63) - 1],
    "stop": ["", [""], [1], {}, 5, ["a"] * 9, "a" * 201],
    "stream": ["true", 1, []],
    "stream_options": [[], "x", {"include_usage": 1}],
    "logit_bias": [[], {"x": 1}, {"512": 1}, {"-1": 1}, {"5": 101}, {"5": "1"}, {"5": True}, {"1_0": 1}],
    "num_draft_tokens": [0, 17, "3"],
    "role_mapping": [[], {"user": 1}],
    "n": [2, 0, -1, "1", 1.0, True],
    "best_of": [2],
    "echo": [True, "x"],
    "suffix": ["x", 1],
    "store": [True],
    "draft_model": ["other/model", 1],
    "adapters": ["somewhere"],
    "xtc_probability": [0.5],
    "user": [1, [], "a" * 1001],
    "metadata": [[], {"a": 1}],
    "model": [1, [], True, {}],
    "prompt": ["", "  \n", [], ["a", "b"], [1, 2], 5, {}, [["a"]]],
    "no_such_field": [1, "x", {}],
    "messages": [[]],
}


@pytest.mark.parametrize("name", WRONG)
def test_fault_71_wrong_values_are_refused_by_name(name):
    for value in WRONG[name]:
        found = refused({**TEXT, name: value})
        assert (found.status, found.param) == (400, name), value
        assert name in found.message


MESSAGES = [
    [], {}, "Hello", [1], ["x"], [{}], [{"role": "user"}], [{"role": "king", "content": "x"}],
    [{"role": ["user"], "content": "x"}], [{"role": "user", "content": 5}],
    [{"role": "user", "content": {"text": "x"}}], [{"role": "user", "content": [1]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "text", "text": 1}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}],
    [{"role": "user", "content": ""}], [{"role": "user", "content": [{"type": "text", "text": " "}]}],
    [{"role": "user", "content": "x", "name": 1}], [{"role": "tool", "content": "x", "tool_call_id": []}],
    [{"role": "assistant", "content": None}], [{"role": "assistant", "tool_calls": "x"}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": 1, "arguments": "{}"}}]}],
]  # fmt: skip


@pytest.mark.parametrize("messages", MESSAGES, ids=lambda one: json.dumps(one)[:40])
def test_fault_71_wrong_messages_are_refused(messages):
    found = refused({"messages": messages}, fields.CHAT)
    assert (found.status, found.param) == (400, "messages")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{}]), ("tools", [{"type": "function"}]), ("tools", "x"), ("tools", [1]),
        ("tools", [{"type": "function", "function": {"name": ""}}]),
        ("tools", [{"type": "function", "function": {"name": "f", "parameters": [1]}}]),
        ("tool_choice", "required"), ("tool_choice", {"type": "function"}), ("parallel_tool_calls", False),
        ("response_format", {"type": "json_object"}), ("modalities", ["audio"]), ("prompt", "x"),
        ("chat_template_kwargs", []), ("chat_template_kwargs", {"chat_template": "x"}),
        ("chat_template_kwargs", {"tokenize": False}), ("chat_template_kwargs", {"a b": 1}),
        ("chat_template_kwargs", {"a": {}}), ("chat_template_kwargs", {"a": "x" * 1001}),
    ],
)  # fmt: skip
def test_fault_71_what_a_chat_may_not_ask_is_refused(name, value):
    found = refused({**CHAT, name: value}, fields.CHAT)
    assert (found.status, found.param) == (400, name)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b'"x"', b"5", b"null", b"\xff\xfe", b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}', b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "\\ud800"}', b'{"\\udc00": 1}', b'{"prompt": "a", "seed": 1' + b"0" * 30 + b"}",
        b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}",
        b'{"prompt": "a", "metadata": ' + b"[" * 40 + b"]" * 40 + b"}",
        b'{"prompt": "a"} x',
    ],
    ids=lambda one: repr(one[:40]),
)  # fmt: skip
def test_fault_71_what_is_no_sound_json_object_is_refused(body):
    assert refused(body).status == 400


def test_fault_73_another_model_is_not_found():
    found = refused({**TEXT, "model": "other/model"})
    assert (found.status, found.code) == (404, "model_not_found")
    for name in ("tiny", "./tiny", "default_model", None):
        assert checked({**TEXT, "model": name})["model"] == "tiny"


def test_what_is_missing_is_named():
    assert refused({}).param == "prompt"
    assert refused({"prompt": None}).param == "prompt"
    assert refused(TEXT, fields.CHAT).param == "messages"


def test_sound_values_pass_and_null_is_as_good_as_left_out():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": ""},
    ]
    body = {
        "messages": messages, "tools": [tool], "stream": True, "stream_options": {}, "temperature": 0,
        "top_p": 1, "top_k": 40, "min_p": 0.05, "logit_bias": {"7": -100}, "stop": "x", "seed": -1, "n": 1,
        "user": "me", "max_tokens": None, "chat_template_kwargs": {"enable_thinking": False},
        "response_format": {"type": "text"}, "tool_choice": "auto",
    }  # fmt: skip
    found = checked(body, fields.CHAT)
    assert "max_tokens" not in found
    assert found["seed"] == 2**64 - 1
    assert found["stop"] == ["x"]
    assert found["stream_options"] == {"include_usage": False}
    assert found["messages"] == messages
    assert checked({**TEXT, "prompt": ["Hello"]})["prompt"] == "Hello"


def test_fields_that_bear_on_one_another():
    assert refused({**TEXT, "stream_options": {"include_usage": True}}).param == "stream_options"
    tool = {"type": "function", "function": {"name": "f"}}
    assert "tools" not in checked({**CHAT, "tools": [tool], "tool_choice": "none"}, fields.CHAT)


def test_a_temperature_that_overflows_is_its_limit():
    assert checked({**TEXT, "temperature": 1e-30})["temperature"] == 0
    assert checked({**TEXT, "temperature": 0.01})["temperature"] == 0.01
