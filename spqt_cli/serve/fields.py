"""Every field of a request's body: its type, its range, and what is not served. It knows no sockets, no MLX.

`checked` turns a body into one that mlx-lm's handler may be given: nothing in it can stop the thread that
generates. What is in no table here is refused by name, not ignored.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from spqt_cli.serve.refusal import Refusal

Check = Callable[[Any], Any]  # the value as it is handed on; ValueError says what is wrong

DEPTH = 32  # levels of nesting: what walks a body (templates, JSON) may recurse
LONGEST_INTEGER = 1 << 64
GREEDY_BELOW = 1e-4  # temperatures: float32 logits divided by less overflow; their limit is the likeliest
TOP_K = 1000  # mlx-lm compiles its filter once for each value
STOPS, STOP_LENGTH = 8, 200  # each piece of text is compared with every beginning of each
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
TOKEN_ID = re.compile(r"[0-9]{1,9}")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
CHAT = "/v1/chat/completions"
ROUTES = {"/v1/completions": "prompt", CHAT: "messages", "/chat/completions": "messages"}


@dataclass(frozen=True)
class Served:
    """What requests are checked against.

    name: the model's; aliases: other names it answers to. vocabulary: tokens, None if unknown. reserved:
    names that the chat template is called with, which a request may not set.
    """

    name: str
    aliases: frozenset[str] = frozenset()
    vocabulary: int | None = None
    reserved: frozenset[str] = frozenset()


def checked(data: bytes, route: str, served: Served) -> dict[str, Any]:
    """The fields of a body as mlx-lm takes them, the model by its own name; null is as good as left out.

    Raises Refusal: 400 for what is wrong, 404 for another model.
    """
    body = {name: value for name, value in _object(data).items() if value is not None}
    model = body.pop("model", served.name)
    if not isinstance(model, str):
        raise Refusal(400, "model must be a string", "model")
    if model not in (served.name, "default_model", *served.aliases):
        said = f"the model {model[:100]!r} is not served here; {served.name!r} is"
        raise Refusal(404, said, "model", "model_not_found")
    needed = ROUTES[route]
    if needed not in body:
        raise Refusal(400, f"{needed} is missing", needed)
    table = {**COMMON, **_of_model(served), **(MESSAGES if needed == "messages" else PROMPT)}
    found: dict[str, Any] = {"model": served.name}
    for name, value in body.items():
        check = table.get(name)
        if check is None:
            raise Refusal(400, f"unknown field: {name[:100]}", name[:100])
        try:
            found[name] = check(value)
        except ValueError as error:
            raise Refusal(400, f"{name} {error}", name) from None
    return _agreed(found)


def _agreed(found: dict[str, Any]) -> dict[str, Any]:
    """Fields that bear on one another."""
    if "stream_options" in found and not found.get("stream"):
        raise Refusal(400, "stream_options need stream: true", "stream_options")
    if found.get("tool_choice") == "none":
        found.pop("tools", None)
    return found


def _object(data: bytes) -> dict[str, Any]:
    """The JSON object that a body is, all of it finite, of valid text and not too deep."""
    try:
        body = _decoded(data.decode("utf-8"))
    except ValueError as error:
        raise Refusal(400, f"the body is no JSON that can be served: {error}") from None
    if not isinstance(body, dict):
        raise Refusal(400, "the body must be a JSON object")
    return body


def _decoded(text: str) -> Any:
    """A JSON value. Raises ValueError for other text, and for values that nothing here can be asked with."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    left: list[tuple[Any, int]] = [(value, 0)]
    while left:
        one, depth = left.pop()
        if depth > DEPTH:
            raise ValueError(f"it is nested more than {DEPTH} levels deep")
        if isinstance(one, dict):
            left += [(each, depth + 1) for pair in one.items() for each in pair]
        elif isinstance(one, list):
            left += [(each, depth + 1) for each in one]
        elif isinstance(one, str):
            _unicode(one)
        elif isinstance(one, (int, float)) and not -LONGEST_INTEGER < one < LONGEST_INTEGER:
            raise ValueError("a number in it is out of range")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a text in it has half of a surrogate pair") from None


def number(least: float, largest: float) -> Check:
    """A number in a range, ends included."""

    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError("must be a number")
        if not least <= value <= largest:
            raise ValueError(f"must be {least:g} to {largest:g}")
        return float(value)

    return check


def whole(least: int, largest: int) -> Check:
    """A whole number in a range, ends included."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError("must be a whole number")
        if not least <= value <= largest:
            raise ValueError(f"must be {least} to {largest}")
        return value

    return check


def text(most: int, least: int = 0) -> Check:
    """A string of so many characters."""

    def check(value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError("must be a string")
        if not least <= len(value) <= most:
            raise ValueError("must not be empty" if len(value) < least else f"is longer than {most}")
        return value

    return check


def boolean(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def objects(most: int) -> Check:
    """A list of so many objects, not empty."""

    def check(value: Any) -> list[dict[str, Any]]:
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            raise ValueError("must be a list of objects")
        if not 0 < len(value) <= most:
            raise ValueError("must not be empty" if not value else f"has more than {most} entries")
        return value

    return check


def only(*possible: Any) -> Check:
    """One of the values that ask for nothing that is not served."""

    def check(value: Any) -> Any:
        if not any(type(value) is type(one) and value == one for one in possible):
            raise ValueError(f"{json.dumps(value)[:100]} is not served; possible: {json.dumps(possible[0])}")
        return value

    return check


def _temperature(value: Any) -> float:
    wished: float = number(0, 100)(value)
    return wished if wished >= GREEDY_BELOW else 0.0


def _repetition_penalty(value: Any) -> float:
    wished: float = number(0, 10)(value)
    if 0 < wished < 0.01:  # logits are divided by it
        raise ValueError("must be 0 or 0.01 to 10")
    return wished


def _stop(value: Any) -> list[str]:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list):
        raise ValueError("must be a string or a list of strings")
    if len(words) > STOPS:
        raise ValueError(f"has more than {STOPS} entries")
    return [text(STOP_LENGTH, 1)(word) for word in words]


def _stream_options(value: Any) -> dict[str, bool]:
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    return {"include_usage": boolean(value.get("include_usage") or False)}


def _prompt(value: Any) -> str:
    if isinstance(value, list):
        if len(value) != 1:
            raise ValueError("must be one string: one prompt is served at a time")
        value = value[0]
    if not isinstance(value, str):
        raise ValueError("must be a string: token ids are not served")
    if not value.strip():
        raise ValueError("must not be empty")
    return value


def _messages(value: Any) -> list[dict[str, Any]]:
    messages = objects(10_000)(value)
    for at, message in enumerate(messages):
        try:
            _message(message)
        except ValueError as error:
            raise ValueError(f"[{at}]: {error}") from None
    if not any(_has_text(message) for message in messages):
        raise ValueError("must not all be empty")
    return messages


def _has_text(message: dict[str, Any]) -> bool:
    content = message.get("content") or ""
    parts = [content] if isinstance(content, str) else [part["text"] for part in content]
    return bool(message.get("tool_calls")) or any(part.strip() for part in parts)


def _message(message: dict[str, Any]) -> None:
    if message.get("role") not in ROLES:
        raise ValueError(f"role must be one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or type(part.get("text")) is not str:
                raise ValueError("content must be text: images and other parts are not served")
    elif content is not None and not isinstance(content, str):
        raise ValueError("content must be a string or a list of text parts")
    calls = message.get("tool_calls")
    if content is None and not calls:
        raise ValueError("content is missing")
    for call in objects(128)(calls) if calls else ():
        _tool_call(call)
    for name in ("name", "tool_call_id"):
        if message.get(name) is not None:
            text(1000)(message[name])


def _tool_call(call: dict[str, Any]) -> None:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("tool_calls need a function with a name")
    arguments = function.get("arguments")
    if not isinstance(arguments, str) or (arguments and not isinstance(_decoded(arguments), dict)):
        raise ValueError("tool_calls need arguments that are a JSON object, as a string")


def _tools(value: Any) -> list[dict[str, Any]]:
    if value == []:
        return value
    tools = objects(128)(value)
    for tool in tools:
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise ValueError("must each be of type function, with a function")
        text(200, 1)(function.get("name"))
        text(100_000)(function.get("description") or "")
        if not isinstance(function.get("parameters") or {}, dict):
            raise ValueError("must have parameters that are an object")
    return tools


def _strings(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
        raise ValueError("must be an object of strings")
    return value


def _of_model(served: Served) -> dict[str, Check]:
    """Fields whose range is the model's."""
    most = (served.vocabulary or LONGEST_INTEGER) - 1

    def logit_bias(value: Any) -> dict[str, float]:
        if not isinstance(value, dict) or len(value) > 1000:
            raise ValueError("must be an object of at most 1000 numbers")
        for token in value:
            if not TOKEN_ID.fullmatch(token) or int(token) > most:
                raise ValueError(f"has the key {token[:20]!r}, which is no token of the model")
        return {str(int(token)): number(-100, 100)(bias) for token, bias in value.items()}

    def template_arguments(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > 32:
            raise ValueError("must be an object of at most 32 entries")
        for name, one in value.items():
            if not NAME.fullmatch(name) or name in served.reserved:
                raise ValueError(f"may not set {name[:64]!r}")
            if not isinstance(one, (bool, int, float, str)) or len(str(one)) > 1000:
                raise ValueError(f"must give {name!r} a short text, a number, true or false")
        return value

    return {
        "top_k": whole(0, min(TOP_K, most)),
        "top_logprobs": whole(0, min(11, most)),
        "logit_bias": logit_bias,
        "chat_template_kwargs": template_arguments,
    }


COMMON: dict[str, Check] = {
    "max_tokens": whole(1, 2**31 - 1),
    "max_completion_tokens": whole(1, 2**31 - 1),
    "temperature": _temperature,
    "top_p": number(1e-4, 1),
    "min_p": number(0, 1),
    "repetition_penalty": _repetition_penalty,
    "repetition_context_size": whole(0, 100_000),
    "presence_penalty": number(-2, 2),
    "presence_context_size": whole(0, 100_000),
    "frequency_penalty": number(-2, 2),
    "frequency_context_size": whole(0, 100_000),
    "logprobs": boolean,
    "seed": lambda value: whole(-(2**63), 2**64 - 1)(value) % 2**64,  # OpenAI's may be negative, MLX's not
    "stop": _stop,
    "stream": boolean,
    "stream_options": _stream_options,
    "num_draft_tokens": whole(1, 16),
    "role_mapping": _strings,
    # Only where they ask for nothing:
    "n": only(1),
    "store": only(False),
    "draft_model": only("default_model"),
    "xtc_probability": only(0, 0.0),  # mlx-lm compiles its filter anew, for most of a second, for each value
    "xtc_threshold": number(0, 0.5),
    # Labels, which change no answer:
    "metadata": _strings,
    **{
        name: text(1000)
        for name in (
            "user",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
        )
    },
}
PROMPT: dict[str, Check] = {"prompt": _prompt, "best_of": only(1), "echo": only(False), "suffix": only("")}
MESSAGES: dict[str, Check] = {
    "messages": _messages,
    "tools": _tools,
    "tool_choice": only("auto", "none"),
    "parallel_tool_calls": only(True),
    "response_format": only({"type": "text"}),
    "modalities": only(["text"]),
}
