"""How many threads numpy's BLAS computes with."""

from contextlib import AbstractContextManager
from functools import cache
from importlib import import_module
from typing import Any, cast


@cache
def _controller() -> Any:
    from threadpoolctl import ThreadpoolController

    import_module("numpy")  # before it is, there is none
    return ThreadpoolController().select(user_api="blas")


def threads() -> int:
    """Those that it may use; 1 where it can't be asked, as on macOS. Of several libraries the fewest."""
    return min((library.num_threads for library in _controller().lib_controllers), default=1)


def limited(count: int) -> AbstractContextManager[Any]:
    """In this block it uses so many, no more than `threads`, whichever thread of the process calls it."""
    return cast(AbstractContextManager[Any], _controller().limit(limits=count))
