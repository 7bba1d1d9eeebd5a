"""spqt: sparse decoding of quantized language models on MLX.

`load(path)` returns `(model, tokenizer)` like `mlx_lm.load`; it is imported on first use, so that
`import spqt_cli` stays cheap. `with decoding():` around a call of the model says that the tokens fed were
generated, so that channels are skipped; mlx-lm's own loops say it by themselves.
"""

import logging
from typing import TYPE_CHECKING, Any, Unpack

from spqt_cli.decode.phase import decoding
from spqt_cli.errors import UsageError, without_mlx
from spqt_cli.version import __version__

if TYPE_CHECKING:
    from mlx import nn

    from spqt_cli.decode.options import Loading

__all__ = ["__version__", "decoding", "load"]


def load(path: str, **options: "Unpack[Loading]") -> "tuple[nn.Module, Any]":
    """The model and tokenizer of a converted folder or hub id, as `mlx_lm.load` returns them.

    Both go into mlx-lm's `generate`, `stream_generate` and `batch_generate`, which decode as `spqt generate`
    does. options: of `spqt_cli.decode.options.Loading`, such as sparsity (0 to 0.95) and dense (bool); not
    draft_model, which is a third thing to return. Notes and warnings go to the logger "spqt".
    Raises SpqtError for a folder that is damaged, was edited or is not converted, UsageError for draft_model
    and for dense together with a sparsity.
    """
    if "draft_model" in options:
        raise UsageError("load returns one model, and draft_model is another", "load it by a call of its own")
    if options.get("dense") and options.get("sparsity") is not None:
        raise UsageError("dense and sparsity exclude one another", "give one of them")
    try:
        from spqt_cli.decode import session
    except ImportError as error:
        if (missing := without_mlx(error)) is None:
            raise
        raise ImportError(f"{missing.cause}: {missing.hint}", name="mlx") from error

    loaded = session.load(path, **options)
    log = logging.getLogger("spqt")
    for line in filter(None, [loaded.note, loaded.warning]):
        log.warning(line)
    return loaded.model, loaded.tokenizer
