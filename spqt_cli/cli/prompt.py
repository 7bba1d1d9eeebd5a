"""The prompt of generate and compare, from a flag, a file or stdin."""

import sys
from pathlib import Path

from spqt_cli.errors import SpqtError, UsageError


def prompt_text(prompt: str | None, prompt_file: Path | None, words: str | None = None) -> str:
    """The text of --prompt, of --prompt-file, or of stdin where neither is given or --prompt is "-".

    words: the prompt as an argument, which is --prompt by another way. Raises UsageError for two, for none on
    a terminal and for an empty text, SpqtError for what is not UTF-8.
    """
    if prompt is not None and words is not None:
        raise UsageError("two prompts are given", "give one: an argument, or --prompt")
    prompt = prompt if words is None else words
    if prompt is not None and prompt_file is not None:
        raise UsageError("--prompt and --prompt-file exclude one another", "give one of them")
    if prompt is not None and prompt != "-":
        text = prompt.replace("\\n", "\n").replace("\\t", "\t")  # as mlx_lm.generate reads it
    elif prompt_file is None and prompt is None and sys.stdin.isatty():
        raise UsageError("no prompt is given", 'give one after the model, "Hello", or pipe text in')
    else:
        from spqt_cli.system import files

        where = str(prompt_file) if prompt_file else "stdin"
        try:
            data = files.read_bounded(prompt_file) if prompt_file else files.drain(sys.stdin.buffer, where)
            text = data.decode("utf-8")
            if prompt_file is None:  # `echo` ends its line, which is no part of what was meant
                text = text.removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise SpqtError(
                f"{where} is not UTF-8: byte {error.start}", "convert the text to UTF-8"
            ) from None
        except OSError as error:
            near = files.near(prompt_file) if prompt_file else ""
            raise SpqtError(
                f"{where} can't be read: {error.strerror}", "give a UTF-8 text file" + near
            ) from None
    if not text.strip():
        raise UsageError("the prompt is empty", 'give one: --prompt "Hello", or pipe text in')
    return text
