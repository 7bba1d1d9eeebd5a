"""A device that quantizes a matrix to something else."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from spqt_cli.convert import convert
from spqt_cli.convert.convert import ConvertOptions
from spqt_cli.errors import BackendError
from tests.conftest import tiny_checkpoint

IN_ROWS = mx.quantize


def lies_in_rows(array: mx.array) -> bool:
    mx.eval(array)
    return bool(memoryview(array.astype(mx.float32)).c_contiguous)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[mx.array]:
    """The matrices that are handed to `mx.quantize`."""
    found: list[mx.array] = []

    def quantize(w: mx.array, *args: Any, **kwargs: Any) -> Any:
        found.append(w)
        return IN_ROWS(w, *args, **kwargs)

    monkeypatch.setattr(mx, "quantize", quantize)
    return found


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_every_matrix_that_mlx_quantizes_lies_in_rows(
    tmp_path: Path, arch: str, seen: list[mx.array]
) -> None:
    assert not lies_in_rows(mx.ones((2, 3)).T)
    convert.convert(str(tiny_checkpoint(tmp_path / "m", arch)), tmp_path / "out", ConvertOptions())
    assert len(seen) > 7
    assert all(lies_in_rows(w) for w in seen)


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (4, 64), (8, 64)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["Zigzag", "row-grouped"])
def test_a_device_that_quantizes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, bits: int, group_size: int, dtype: str
) -> None:
    """Its codes are of the matrix in another order, as those of MLX 0.32.4's CUDA build may be."""

    def quantize(w: mx.array, *args: Any, **kwargs: Any) -> Any:
        if (w.ndim == 3) == (kind == "Zigzag"):
            w = w.reshape(-1)[::-1].reshape(w.shape)
        return IN_ROWS(w, *args, **kwargs)

    source = tiny_checkpoint(tmp_path / "m", "llama")
    options = ConvertOptions(bits, group_size, dtype)
    convert.convert(str(source), tmp_path / "right", options)
    monkeypatch.setattr(mx, "quantize", quantize)
    with pytest.raises(BackendError, match="quantizes model"):
        convert.convert(str(source), tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
