"""Errors that the user can act on: a cause, a hint, and the exit code of their kind."""

INSTALL_HINT = (
    'pip install "spqt[cpu]" (Linux without a GPU), "spqt[cuda13]" or "spqt[cuda12]" (NVIDIA), or uv tool '
    "and pipx likewise; on Apple silicon: pip install --force-reinstall spqt"
)
# Hints for damaged files: of a source, and of a converted folder.
AGAIN = "download it again"
CONVERT_AGAIN = "download or convert the model again"


class SpqtError(Exception):
    """Bad input (exit 3): which file or value, what was found, and `hint`: what to do about it."""

    exit_code = 3

    def __init__(self, cause: str, hint: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.hint = hint
        if hint:
            self.add_note(f"hint: {hint}")  # for a traceback, which Python's callers see


class UsageError(SpqtError):
    """A value on the command line that can't be used (exit 2)."""

    exit_code = 2


class UnsupportedError(SpqtError):
    """A model, dtype or file kind that spqt does not handle (exit 4)."""

    exit_code = 4


class ResourceError(SpqtError):
    """Disk, memory or permission missing (exit 5)."""

    exit_code = 5


class BackendError(SpqtError):
    """The device, its driver or MLX failed (exit 6)."""

    exit_code = 6


class BusyError(SpqtError):
    """The output exists or another run owns it (exit 7)."""

    exit_code = 7


class ElsewhereError(SpqtError):
    """Another of the processes that run a model together failed (exit 3), and said why itself."""


class Terminated(SystemExit):
    """SIGTERM came: the process ends with 143. Told apart from a library that exits the process."""


def without_mlx(error: ImportError) -> BackendError | None:
    """What to say where MLX is missing or broken; None where it is another module that can't be imported."""
    if (error.name or "").split(".")[0] != "mlx" and "libmlx" not in str(error):
        return None
    missing = isinstance(error, ModuleNotFoundError)
    return BackendError("MLX is not installed" if missing else f"MLX can't be loaded: {error}", INSTALL_HINT)
