"""`spqt chat`: its flags, the lines that are typed, and the commands among them."""

import contextlib
import difflib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import typer

from spqt_cli.cli import flags
from spqt_cli.cli.flags import Adapter, Json, ModelArgument, ModelOption, Quiet, Revision, Trust
from spqt_cli.cli.output import end_line, show
from spqt_cli.errors import SpqtError, UsageError
from spqt_cli.system.terminal import harmless

if TYPE_CHECKING:
    from spqt_cli.decode.conversation import Conversation
    from spqt_cli.decode.generate import Statistics

COMMANDS = {
    "/help": "this list",
    "/stats": "speed and bytes of the last answer, and of all at each sparsity",
    "/sparsity": "0.4: skip 40 % from here on; 0: only exact zeros; dense: nothing; alone: say what is set",
    "/set": "temp 0.7: draw the next answers so; temp default: as at first; alone: what can be set",
    "/load": "FILE: send what is in a file",
    "/clear": "forget what was said",
    "/quit": "end; so do /exit, /bye and Ctrl-D",
}
ENDS = ("/quit", "/exit", "/bye")
LONGEST_LINE = 1 << 20  # bytes of a message


def chat(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    dense: flags.Dense = False,
    sparsity: flags.Sparsity = None,
    system_prompt: flags.SystemPrompt = None,
    max_tokens: flags.MaxTokens = 512,
    temp: flags.Temp = 0.0,
    top_p: flags.TopP = 1.0,
    min_p: flags.MinP = 0.0,
    top_k: flags.TopK = 0,
    xtc_probability: flags.XtcProbability = 0.0,
    xtc_threshold: flags.XtcThreshold = 0.1,
    repetition_penalty: flags.RepetitionPenalty = None,
    presence_penalty: flags.PresencePenalty = None,
    frequency_penalty: flags.FrequencyPenalty = None,
    seed: flags.Seed = None,
    stop: flags.Stop = None,
    chat_template_config: flags.ChatTemplateConfig = None,
    max_kv_size: flags.MaxKvSize = None,
    prefill_step_size: flags.PrefillStepSize = 2048,
    adapter_path: Adapter = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    json_output: Json = False,
) -> None:
    """Talk with a model; /help lists what else can be typed. In a pipe each line is a message.

    Ctrl-C ends an answer, at the prompt the conversation. With --json each answer is a JSON object in a line.
    """
    given = locals()  # by the names that the options have in decode/options.py
    path = flags.needed(model, model_option, "spqt chat MODEL")
    if dense and sparsity is not None:
        raise UsageError("--dense and --sparsity exclude one another", "give one of them")
    from spqt_cli.decode import session
    from spqt_cli.decode.conversation import Conversation
    from spqt_cli.decode.options import Cache, Loading, Options, Prompt, Sampling, check, picked

    sampling, template = picked(Sampling, given), picked(Prompt, {**given, "text": ""})
    options = picked(Options, {**given, "cache": picked(Cache, given)})
    loading = picked(Loading, given)
    loaded = session.load(path, **loading)
    check(sampling, options.cache, loaded.config)
    talk = Talk(Conversation(loaded, loading, template, sampling, options), quiet, json_output)
    interactive = _is_typed()
    if interactive and not quiet:
        typer.echo(f"{path}, {talk.mode()}; /help lists commands, /quit ends", err=True)
    talk.note()
    for line in _lines(interactive):
        if line.strip() in ENDS:
            break
        try:
            talk.take(line)
        except SpqtError as error:
            if not (interactive and talk.goes_on):
                raise
            typer.echo(harmless(f"{error.cause}\n  hint: {error.hint}"), err=True)
        except KeyboardInterrupt:
            if not (interactive and talk.goes_on):
                raise
            typer.echo("\n(answer ended)", err=True)


@dataclass
class Sum:
    """Of the answers at one sparsity."""

    answers: int = 0
    tokens: int = 0
    seconds: float = 0.0
    weight_bytes: float = 0.0

    def line(self) -> str:
        """Speed and bytes, of a token on average."""
        count = f"{self.answers} answer{'s' if self.answers > 1 else ''}, {self.tokens} tokens"
        speed = f"{self.tokens / self.seconds:.1f} tok/s"
        return f"{count}, {speed}, {self.weight_bytes / self.tokens / 1e6:.1f} MB of weights a token"


@dataclass
class Talk:
    """A conversation in a terminal or a pipe: what each line does, and what was measured."""

    conversation: "Conversation"
    quiet: bool
    json_output: bool
    last: "Statistics | None" = None
    sums: dict[str, Sum] = field(default_factory=dict)

    def take(self, line: str) -> None:
        """Answer a message, or do what a command says. Raises UsageError for one that there is not."""
        command, _, rest = line.strip().partition(" ")
        if not command:
            return
        if not line.startswith("/"):
            self._answer(line)
        elif command in COMMANDS and command not in ENDS:
            getattr(self, f"_{command[1:]}")(rest.strip())
        else:
            near = difflib.get_close_matches(command, [*COMMANDS, *ENDS], 1)
            hint = f"did you mean {near[0]}?" if near else "/help lists them"
            raise UsageError(f"{command} is no command", f"{hint}; a message may begin with a space")

    def _help(self, _: str) -> None:
        width = max(map(len, COMMANDS))
        self._say("\n".join(f"{name:<{width}}  {what}" for name, what in COMMANDS.items()))

    def _stats(self, _: str) -> None:
        self._say(self._statistics())

    def _sparsity(self, wanted: str) -> None:
        if wanted:
            self.conversation.skip(_fraction(wanted))
        self._say(self.mode())
        self.note()

    def _set(self, wanted: str) -> None:
        name, _, text = wanted.partition(" ")
        name, known = name.replace("-", "_"), self.conversation.settings
        if not name:
            shown = {key: "-" if value is None else f"{value:g}" for key, value in known.items()}
            self._say("\n".join(f"{key:<20}{value}" for key, value in shown.items()))
            return
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else "/set alone lists them"
            raise UsageError(f"/set {name}: there is nothing of that name", hint)
        self.conversation.set(name, None if text == "default" else _number(f"/set {name}", text))
        value = self.conversation.settings[name]
        self._say(f"{name} {'-' if value is None else f'{value:g}'}")

    def _load(self, name: str) -> None:
        from spqt_cli.system import files

        path = files.expanded(name)
        try:
            text = files.read_bounded(path, LONGEST_LINE).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            said = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else f"{error.strerror}"
            raise SpqtError(f"{name or '/load'}: {said}", "/load FILE" + files.near(path)) from None
        self._answer(text)

    def _clear(self, _: str) -> None:
        self.conversation.clear()
        self._say("forgotten")

    @property
    def goes_on(self) -> bool:
        """False where /sparsity broke off while the model was loaded anew: there is none then."""
        return hasattr(self.conversation, "loaded")

    def mode(self) -> str:
        """What is skipped."""
        sparsity = self.conversation.loaded.sparsity
        return "nothing is skipped" if sparsity is None else f"{sparsity:.0%} of the channels skipped"

    def note(self) -> None:
        """Say what the user should know of the model as it is loaded."""
        loaded = self.conversation.loaded
        if not self.quiet:
            for text in filter(None, [loaded.note and f"note: {loaded.note}", loaded.warning]):
                self._say(text)

    def _answer(self, text: str) -> None:
        with contextlib.closing(self.conversation.reply(text)) as pieces:
            found = self.last = show(pieces, json_output=self.json_output)
        sparsity = self.conversation.loaded.sparsity
        one = self.sums.setdefault("dense" if sparsity is None else f"{sparsity:.0%}", Sum())
        one.answers += 1
        one.tokens += found.generation_tokens
        one.seconds += found.generation_tokens / found.generation_tps
        one.weight_bytes += found.generation_tokens * found.weight_bytes_per_token
        if not (self.quiet or self.json_output):
            cut = ", cut off by --max-tokens" if found.finish_reason == "length" else ""
            self._say(
                f"  {found.generation_tokens} tokens, {found.generation_tps:.1f} tok/s, "
                f"{found.sparsity:.0%} skipped{cut}"
            )

    def _statistics(self) -> str:
        if self.last is None:
            return "nothing was answered yet"
        from spqt_cli.decode import session

        more = session.more_than_stored(self.conversation.loaded, self.last.dense_weight_bytes_per_token)
        lines = ["last answer: " + self.last.line().replace(" | ", "\n  ")]
        lines += [*([f"  {more}"] if more else []), "all answers:"]
        lines += [f"  {name:>5}: {one.line()}" for name, one in self.sums.items()]
        return "\n".join([*lines, f"{self.conversation.tokens} tokens are in the key-value cache"])

    def _say(self, text: str) -> None:
        typer.echo(harmless(text), err=True)


def _fraction(text: str) -> float | None:
    """ "0.4", "40%" or "dense", which is None."""
    if text == "dense":
        return None
    percent = text.endswith("%")
    return _number("/sparsity", text.removesuffix("%")) / (100 if percent else 1)


def _number(command: str, text: str) -> float:
    """A finite number. Raises UsageError for what is none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        hint = "/sparsity 0.4, or /sparsity dense" if command == "/sparsity" else f"{command} 1"
        raise UsageError(f"{command} {text}: that is no number", hint)
    return value


def _is_typed() -> bool:
    return sys.stdin.isatty()


def _lines(interactive: bool) -> Iterator[str]:
    """The lines that are typed, or come through a pipe."""
    if not interactive:
        yield from _piped()
        return
    _complete_commands()
    while True:
        try:
            yield input("> " if sys.stdout.isatty() else "")
        except EOFError:  # Ctrl-D, which a terminal does not echo
            end_line()
            return


def _complete_commands() -> None:
    """Let input() edit lines and keep what was typed in this conversation, and Tab complete commands."""
    try:
        import readline
    except ImportError:
        return

    def complete(begun: str, number: int) -> str | None:
        found = [name for name in (*COMMANDS, *ENDS[1:]) if name.startswith(begun)] if begun else []
        return found[number] if number < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    libedit = "libedit" in (readline.__doc__ or "")  # a Mac's
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


def _piped() -> Iterator[str]:
    while data := sys.stdin.buffer.readline(LONGEST_LINE + 1):
        if len(data) > LONGEST_LINE:
            raise SpqtError("a line of stdin is longer than 1 MB", "send shorter messages")
        try:
            yield data.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise SpqtError(
                f"stdin is not UTF-8: byte {error.start} of a line", "convert the text to UTF-8"
            ) from None
