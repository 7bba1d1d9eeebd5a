"""The tables by bytes read per token: what counts, and which share reads as much as 3 bits do."""

from pathlib import Path

import numpy as np
import pytest

from spqt_cli.convert import convert
from spqt_cli.convert.convert import ConvertOptions
from spqt_cli.decode import session
from tests.conftest import tiny_checkpoint

quality = pytest.importorskip("benchmarks.quality", reason="benchmarks/ is not part of a source archive")


@pytest.mark.parametrize(("arch", "tied"), [("llama", True), ("qwen2", False)])
def test_bytes_read_are_weights_and_16_bit_scales(tmp_path: Path, arch: str, tied: bool) -> None:
    options = ConvertOptions(group_size=32, dtype="float16")
    result = convert.convert(str(tiny_checkpoint(tmp_path / "m", arch)), tmp_path / "out", options)
    read = [size for name, _, bits, _, size in result.rows if bits and (tied or "embed" not in name)]
    sizes = quality.quantized_bytes(session.load(tmp_path / "out").model)
    assert sum(sizes.values()) == sum(read)
    assert ("model.embed_tokens" in sizes) == tied


def test_share_that_reads_what_three_bits_do(checkpoint: Path, calibrated: Path, tmp_path: Path) -> None:
    convert.convert(str(checkpoint), tmp_path / "few", ConvertOptions(bits=3, group_size=32))
    loaded, few = session.load(calibrated, dense=True), session.load(tmp_path / "few")
    subjects = quality.sparse_against_fewer_bits(str(checkpoint), loaded, few.model, [0.4])
    equal = next(
        name for name in subjects if name not in ("Zigzag 4-bit", "Zigzag 4-bit at 40%") and " at " in name
    )
    share = float(equal.rpartition(" ")[2].rstrip("%")) / 100
    dense, rows = subjects["Zigzag 4-bit"], subjects["row-grouped 3-bit"]
    body = sum(dense.sizes[path] for path in dense.skippable)
    assert abs(dense.touched - share * body - rows.touched) <= 1e-4 * body  # names have two digits
    assert set(subjects) == {
        "Zigzag 4-bit",
        "Zigzag 4-bit at 40%",
        equal,
        "row-grouped 3-bit",
        "Zigzag 3-bit",
    }


def test_masked_model_reads_less_and_differs(
    checkpoint: Path, calibrated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = session.load(calibrated, dense=True)
    dense = quality.Subject(loaded.model)
    sparse = quality.Subject(loaded.model, dict.fromkeys(dense.skippable, 0.7))
    rows = np.random.default_rng(0).integers(3, 500, (3, quality.WINDOW))
    source, first, second = quality.score(
        str(checkpoint), {"dense": dense, "sparse": sparse}, rows, lambda *_: None
    )
    assert source["name"] == "source"
    assert first["skipped"] == 0 < second["skipped"] < 1
    assert second["bytes_per_token"] < first["bytes_per_token"]
    kl = [row["against"]["source"]["kl"] for row in (first, second)]
    assert 0 < kl[0] < kl[1]
    assert "sparse" in capsys.readouterr().out
