"""A wrong command line as one line and a hint, instead of Typer's usage, advice and error."""

import difflib
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from spqt_cli.errors import UsageError

_NEAR = re.compile(r"\(Possible options: (.*)\)$|Did you mean (.*?)\??\)?$")
_VALUE = re.compile(r"Invalid value for (?P<what>.*?): (?:Value error, )?(?P<why>.*)")
_TYPE = re.compile(r", unable to parse .*")  # what a type's error adds to "should be a valid number"
_MANY = re.compile(r"Got unexpected extra argument(?:\(s\)|s)? \((.*)\)")


def is_wrong(error: BaseException) -> bool:
    """Whether an exception is Typer's, for a command line that it can't take; its classes change places."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def as_line(error: Any, arguments: Sequence[str], examples: Mapping[str, str]) -> UsageError | None:
    """What to say of Typer's exception; None for a help page, which it shows itself.

    examples: name of a command -> how it is called.
    """
    message: str = error.format_message().strip()
    if "\n" in message:
        return None
    found = _NEAR.search(message)
    cause = (message[: found.start()] if found else message).rstrip(" .(")
    cause = _MANY.sub(r"too many arguments: \1", cause)
    if value := _VALUE.fullmatch(cause):
        why = _TYPE.sub("", value["why"])
        cause = f"{_as_given(value['what'], arguments)}: {why[:1].lower()}{why[1:]}"
    name = next((one for one in arguments if not one.startswith("-")), "")
    known = name in examples
    hint = f"spqt {name} -h shows what it takes" if known else "spqt -h lists the commands"
    near = _alike(found[1] or found[2], cause.split()[-1]) if found else ""
    if near:
        hint = f"did you mean {near}? {hint}"
    elif known and message.startswith(("Missing", "No such option")):
        hint = f"for example: {examples[name]}; {hint}"
    return UsageError(cause[:1].lower() + cause[1:], hint)


def _alike(names: str, given: str) -> str:
    """Of names that Typer finds near what was given those that are without their dashes, "a, b or c"."""
    bare = given.lstrip("-")
    alike = [
        name
        for name in names.split(", ")
        if not name.startswith("-") or difflib.get_close_matches(bare, [name.lstrip("-")])
    ]
    return re.sub(r", (?=[^,]*$)", " or ", ", ".join(alike))


def _as_given(what: str, arguments: Sequence[str]) -> str:
    """ "'--max-tokens' / '-m'" -> "-m ten", where that is on the command line."""
    names = re.findall(r"'(-.*?)'", what)
    for one, after in itertools.pairwise([*arguments, ""]):
        if one in names:
            return f"{one} {after}"
        if one.partition("=")[0] in names:
            return one
    return what.replace("'", "")
