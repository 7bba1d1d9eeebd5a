"""The tables by bytes read per token, the text of the standard library, and the distilled peer."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from spqt_cli.convert import convert, source_model
from spqt_cli.convert.convert import ConvertOptions
from spqt_cli.decode import session
from spqt_cli.evaluate import variants
from spqt_cli.measure import scoring, texts
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


def test_a_text_of_the_standard_library_is_the_same_again(tmp_path: Path) -> None:
    found = [quality.stdlib_text(tmp_path / name) for name in ("one.txt", "other.txt")]
    assert found[0] == found[1]
    document = texts.read(tmp_path / "one.txt")
    assert document.sha256 == found[0]["sha256"]
    assert len(document.documents) == len(quality.MODULES)
    assert found[0]["bytes"] > 24 * quality.WINDOW * 4  # 24 windows of rare tokens


@pytest.mark.parametrize("bits", [4, 5])
def test_products_on_the_cpu_have_the_stock_gradients(bits: int) -> None:
    from benchmarks.peer import dwq

    mx.random.seed(0)
    layer = nn.QuantizedLinear(64, 96, bias=True, group_size=32, bits=bits)
    x = mx.random.normal((2, 5, 64))

    def loss(arrays: list[mx.array]) -> mx.array:
        x, layer.scales, layer.biases = arrays
        return (layer(x) ** 2).sum()

    arrays = [x, layer.scales, layer.biases]
    stock = mx.value_and_grad(loss)(arrays)
    with dwq.fast_on_cpu():
        found = mx.value_and_grad(loss)(arrays)
    for one, other in zip([found[0], *found[1]], [stock[0], *stock[1]], strict=True):
        # float32 in another order of summation
        assert mx.allclose(one, other, rtol=1e-4, atol=1e-5 * mx.abs(other).max().item())


def test_stock_distilled_is_a_folder_of_mlx_lm(checkpoint: Path, calibrated: Path, tmp_path: Path) -> None:
    from benchmarks.peer import dwq

    rows = source_model.settings_of(session.load(calibrated).model)
    windows = np.random.default_rng(0).integers(3, 500, (18, 33))
    np.save(tmp_path / "windows.npy", windows)
    read = dwq.windows_of(tmp_path / "windows.npy", None, 17 * 33, 512)
    assert read.shape == (17, 33)
    np.savez(tmp_path / "kept.npz", windows=windows)
    assert (dwq.windows_of(tmp_path / "kept.npz", None, 17 * 33, 512) == read).all()
    found = dwq.distil(str(checkpoint), rows, read, tmp_path / "out", dwq.Settings(1e-4, batch=5, epochs=2))
    assert found == {"steps": 6, "windows": 17, "tokens": 17 * 33}  # two of the windows are held out
    stock, distilled = source_model.load(str(checkpoint), rows), variants.load_peer(str(tmp_path / "out"))
    assert source_model.settings_of(distilled) == rows
    own, theirs = (one.model.layers[0].mlp.up_proj for one in (distilled, stock))
    assert (own.weight == theirs.weight).all()
    assert not (own.scales == theirs.scales).all()
    source = source_model.load(str(checkpoint))
    kl = []
    for network in (stock, distilled):
        scores = scoring.Scores()
        log_p = [scoring.log_probabilities(one(mx.array(read[:, :-1]))) for one in (source, network)]
        scores.add(log_p[1], read[:, 1:], {"source": scoring.Reference(log_p[0])})
        kl.append(scores.against("source").kl)
    assert kl[1] < kl[0]
