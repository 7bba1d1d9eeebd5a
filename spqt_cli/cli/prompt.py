"""The prompt of generate and compare, from a flag, a file or stdin."""

import sys
from pathlib import Path

from spqt_cli.errors import SpqtError, UsageError


def prompt_text(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise UsageError("--prompt and --prompt-file exclude one another", "give one of them")
    if prompt is not None and prompt != "-":
        text = prompt.replace("\\n", "\n").replace("\\t", "\t")  # as mlx_lm.generate reads it
    elif prompt_file is None and prompt is None and sys.stdin.isatty():
        raise UsageError("there is no prompt", 'give one: --prompt "Hello", or pipe text in')
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
            raise SpqtError(f"{where} can't be read: {error.strerror}", "give a UTF-8 text file") from None
    if not text.strip():
        raise UsageError("the prompt is empty", 'give one: --prompt "Hello", or pipe text in')
    return text


def check_max_tokens(max_tokens: int) -> None:
    if max_tokens == 0 or max_tokens < -1:
        raise UsageError(
            f"--max-tokens {max_tokens}: nothing to do", "give a positive number, or -1 for no limit"
        )


def check_sparsity(sparsity: float | None) -> None:
    if sparsity is not None and not 0 <= sparsity <= 0.95:
        raise UsageError(f"sparsity {sparsity} is not in 0 to 0.95", "0.25 skips a quarter")
