"""spqt: sparse decoding of quantized language models on MLX.

`load(path)` returns `(model, tokenizer)` like `mlx_lm.load`; it is imported on first use, so that
`import spqt_cli` stays cheap. `with decoding():` around a call of the model says that the tokens fed were
generated, so that channels are skipped; mlx-lm's own loops say it by themselves.
"""

from typing import Any

from spqt_cli.decode.phase import decoding
from spqt_cli.version import __version__

__all__ = ["__version__", "decoding", "load"]


def load(path: str, **kwargs: Any) -> tuple[Any, Any]:
    """The model and tokenizer of a converted folder or hub id, checked and patched.

    Keyword arguments are those of `spqt_cli.decode.session.load`.
    """
    from spqt_cli.decode import session

    loaded = session.load(path, **kwargs)
    return loaded.model, loaded.tokenizer
