"""The beginning of a prompt whose key-value cache lies in a file: what `mlx_lm.cache_prompt` writes."""

from pathlib import Path
from typing import Any

from spqt_cli.decode import context
from spqt_cli.decode.options import Cache
from spqt_cli.decode.session import Loaded
from spqt_cli.errors import SpqtError, UsageError
from spqt_cli.format import checkpoint_files
from spqt_cli.system import files

MAKE = "make one: spqt mlx-lm cache_prompt --model MODEL --prompt TEXT --prompt-cache-file FILE"


def read(path: Path, name: str, loaded: Loaded, cache: Cache) -> list[Any]:
    """The caches of a file, one for each layer.

    name: of the model as it was given. Raises UsageError where the file is of another model or of another
    quantization than `cache` asks for, SpqtError where it is none.
    """
    from mlx_lm.models.cache import QuantizedKVCache, load_prompt_cache, make_prompt_cache

    if not path.is_file():
        raise SpqtError(f"{path} is not found", MAKE + files.near(path))
    checkpoint_files.read_shard(path, path.name)
    try:
        caches, metadata = load_prompt_cache(str(path), return_metadata=True)
        made_for = metadata["model"]
    except Exception as error:  # what a foreign file says may fail anywhere
        raise SpqtError(f"{path} holds no cache of a prompt ({type(error).__name__})", MAKE) from None
    if made_for != name:
        raise UsageError(f"{path} was made with the model {made_for}, not {name}", "name the same model")
    if len(caches) != len(make_prompt_cache(loaded.model)):
        raise SpqtError(f"{path} has {len(caches)} layers, the model has others", MAKE)
    first = caches[0]
    if isinstance(first, QuantizedKVCache):
        kept = (first.bits, first.group_size)
        if cache.kv_bits not in (None, first.bits) or cache.kv_group_size != first.group_size:
            raise UsageError(f"{path} has {kept[0]} bits in groups of {kept[1]}", "leave --kv-bits out")
    limit = context.tokens(loaded.config)
    if limit is not None:
        context.room(limit, context.held(caches))
    return list(caches)
