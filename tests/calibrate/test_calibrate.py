"""Calibration of a tiny converted model: what is written, what is refused, what survives a kill."""

import dataclasses
import errno
import io
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from spqt_cli.calibrate import calibrate
from spqt_cli.calibrate.calibrate import CalibrateOptions
from spqt_cli.calibrate.progress import NAME
from spqt_cli.decode import layers, session
from spqt_cli.errors import BusyError, ResourceError, SpqtError, UsageError
from spqt_cli.format import config_json, contract, thresholds
from spqt_cli.format.folder import Folder
from spqt_cli.measure import probes

OPTIONS = CalibrateOptions(sparsity=0.4, tokens=512, window=64, method="uniform")


def quiet(done: float, total: float, what: str) -> None:
    assert 0 <= done <= total


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "model"))


@pytest.fixture(scope="module")
def done(converted: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = Path(shutil.copytree(converted, tmp_path_factory.mktemp("calibrate") / "model"))
    return folder, calibrate.calibrate(folder, OPTIONS, quiet)


def without_mirror(folder: Path) -> dict:
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    return config


def test_thresholds_reach_the_target(done):
    _, result = done
    assert {row.target for row in result.layers} == {0.4}
    # Held-out windows of other words; within calibration windows it is exact to the histogram's bins.
    assert result.realised == pytest.approx(0.4, abs=0.02)


def test_only_config_json_and_the_card_change(done, converted):
    folder, _ = done
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in converted.iterdir())
    for path in converted.iterdir():
        is_same = path.read_bytes() == (folder / path.name).read_bytes()
        assert is_same == (path.name not in ("config.json", "README.md"))


def test_stored_thresholds_pass_the_checks_and_load(done):
    folder, result = done
    loaded = session.load(folder)
    assert loaded.sparsity == 0.4
    loaded_values = {p: layer.threshold.item() for p, layer in layers.zigzag_layers(loaded.model).items()}
    for row in result.layers:
        assert loaded_values[row.path] == pytest.approx(row.threshold, rel=1e-5)
    section = loaded.config["spqt"]["calibration"]
    assert section["fingerprint"] == loaded.folder.weights_fingerprint
    assert len(section["text"]["sha256"]) == 64


def test_what_enters_layers_is_recorded(done):
    recorded = contract_of(done)["quantiles"]
    for path, row in contract_of(done)["layers"].items():
        assert recorded[path] == sorted(recorded[path])
        assert len(recorded[path]) == len(thresholds.QUANTILES)
        at_target = np.interp(row["target"], thresholds.QUANTILES, recorded[path])
        assert at_target == pytest.approx(layers_of(done)[path].threshold, rel=0.25)  # refined since
    nothing_finite = np.zeros(thresholds.BINS, int)
    nothing_finite[-1] = 5
    assert calibrate._quantiles(nothing_finite) == calibrate._quantiles(np.zeros(thresholds.BINS, int)) == []


def layers_of(done) -> dict:
    return Folder(done[0]).layers


def contract_of(done) -> dict:
    return json.loads((done[0] / "config.json").read_text())["spqt"]["calibration"]


def test_curve_derives_other_sparsities(done):
    folder, _ = done
    low, high = (session.load(folder, sparsity=s) for s in (0.2, 0.6))
    pairs = zip(
        layers.zigzag_layers(low.model).values(), layers.zigzag_layers(high.model).values(), strict=True
    )
    assert all(0 < a.threshold.item() < b.threshold.item() for a, b in pairs)


def test_same_seed_same_result_and_remove_restores_the_bytes(done, converted, folder):
    calibrate.calibrate(folder, OPTIONS, quiet)
    assert without_mirror(folder) == without_mirror(done[0])
    calibrate.remove(folder)
    assert without_mirror(folder) == without_mirror(converted)


def test_recalibrating_replaces(folder):
    calibrate.calibrate(folder, OPTIONS, quiet)
    before = session.load(folder).config["quantization"]
    result = calibrate.calibrate(folder, dataclasses.replace(OPTIONS, sparsity=0.2), quiet)
    assert result.realised == pytest.approx(0.2, abs=0.02)
    assert session.load(folder).config["quantization"] != before


def test_sparsity_zero_writes_zero_thresholds(folder):
    result = calibrate.calibrate(folder, CalibrateOptions(sparsity=0.0, tokens=128, window=64), quiet)
    assert result.realised == 0
    assert {row.threshold for row in result.layers} == {0.0}


def test_fault_32_thresholds_of_other_weights_are_replaced(folder):
    calibrate.calibrate(folder, OPTIONS, quiet)
    config = config_json.read_config(folder)
    config["spqt"]["calibration"]["fingerprint"] = "0" * 64
    config_json.write_config(folder, config)
    with pytest.raises(SpqtError, match="another model"):
        session.load(folder)
    calibrate.calibrate(folder, OPTIONS, quiet)
    assert session.load(folder).sparsity == 0.4


@pytest.mark.parametrize("bad", [float("nan"), -1.0, "much"])
def test_fault_33_damaged_thresholds_are_replaced(folder, bad):
    calibrate.calibrate(folder, OPTIONS, quiet)
    config = config_json.read_config(folder)
    next(iter(contract.entries(config).values()))["spqt"]["threshold"] = bad
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpqtError, match="threshold"):
        session.load(folder)
    calibrate.calibrate(folder, OPTIONS, quiet)
    assert session.load(folder).sparsity == 0.4


def test_fault_56_read_only_folder_is_refused_before_work(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(ResourceError):
        calibrate.calibrate(folder, OPTIONS, lambda *_: pytest.fail("work was begun"))


def test_not_a_converted_model(checkpoint, tmp_path):
    for path in (checkpoint, tmp_path / "none"):
        with pytest.raises(SpqtError):
            calibrate.calibrate(path, OPTIONS, quiet)


def test_fault_49_text_too_short(folder, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("the quick brown fox\n")
    with pytest.raises(SpqtError, match=r"it has \d tokens, 8 windows of 64 need 512"):
        calibrate.calibrate(folder, CalibrateOptions(data=text, tokens=512, window=64), quiet)
    assert "calibration" not in config_json.read_config(folder)["spqt"]


@pytest.mark.parametrize(
    "bad", [{"sparsity": 0.96}, {"sparsity": float("nan")}, {"method": "magic"}, {"tokens": 10}]
)
def test_bad_options(folder, bad):
    with pytest.raises(UsageError):
        calibrate.calibrate(folder, CalibrateOptions(**bad), quiet)


@pytest.mark.parametrize("method", ["uniform", "auto"])
def test_fault_51_dead_layer_is_flagged_and_stays_dense(folder, method):
    loaded = session.load(folder)
    # The norm in front of the first block's MLP has weight 0: gate and up see only zeros, down too.
    import mlx.core as mx

    shard = next(folder.glob("model*.safetensors"))
    arrays, metadata = mx.load(str(shard), return_metadata=True)
    name = "model.layers.0.post_attention_layernorm.weight"
    mx.save_safetensors(str(shard), {**arrays, name: mx.zeros_like(arrays[name])}, metadata=metadata)
    del loaded
    result = calibrate.calibrate(folder, dataclasses.replace(OPTIONS, method=method), quiet)
    dead = {row.path for row in result.layers if row.dead}
    assert dead == {f"model.layers.0.mlp.{kind}_proj" for kind in ("gate", "up", "down")}
    assert all(row.threshold == 0 and row.realised == 0 for row in result.layers if row.dead)
    assert any(row.realised > 0.2 for row in result.layers)
    out = io.StringIO()
    calibrate.print_table(result, out)
    assert "3 layers with constant inputs stay dense" in out.getvalue()


class Killed(BaseException):
    pass


def killed_after(steps: int):
    reported: list[str] = []

    def on_progress(done: float, total: float, what: str) -> None:
        if len(reported) == steps:
            raise Killed
        reported.append(what)

    return on_progress


@pytest.mark.parametrize("steps", [1, 5])
def test_fault_53_killed_run_resumes_to_the_same_result(done, converted, folder, steps):
    with pytest.raises(Killed):
        calibrate.calibrate(folder, OPTIONS, killed_after(steps))
    assert (folder / "config.json").read_bytes() == (converted / "config.json").read_bytes()
    seen = []
    calibrate.calibrate(folder, OPTIONS, lambda done, total, what: seen.append(done))
    assert seen[0] == steps  # windows already observed are not run again
    assert without_mirror(folder) == without_mirror(done[0])
    assert not list(folder.glob(".spqt*"))


@pytest.mark.parametrize("change", [{"seed": 1}, {"tokens": 576}, {"sparsity": 0.3}, {"data": "other"}])
def test_fault_52_resume_with_other_settings(folder, tmp_path, change):
    with pytest.raises(Killed):
        calibrate.calibrate(folder, OPTIONS, killed_after(2))
    if "data" in change:
        change = {"data": tmp_path / "other.txt"}
        change["data"].write_text("pack my box with five dozen liquor jugs " * 200)
    other = dataclasses.replace(OPTIONS, **change)
    with pytest.raises(BusyError, match="unfinished") as caught:
        calibrate.calibrate(folder, other, quiet)
    assert caught.value.exit_code == 7
    calibrate.calibrate(folder, dataclasses.replace(other, restart=True), quiet)
    assert not (folder / NAME).exists()


def test_damaged_progress_starts_over(done, folder):
    (folder / NAME).write_bytes(b"PK\x03\x04 torn")
    calibrate.calibrate(folder, OPTIONS, quiet)
    assert without_mirror(folder) == without_mirror(done[0])


def test_remove_on_a_plain_model(checkpoint):
    with pytest.raises(SpqtError, match="not a converted model"):
        calibrate.remove(checkpoint)


def test_table_shows_blocks_in_order(done):
    out = io.StringIO()
    calibrate.print_table(done[1], out)
    lines = out.getvalue().splitlines()
    assert lines[0].split() == ["block", *(f"{k}_proj" for k in ("q", "k", "v", "o", "gate", "down", "up"))]
    assert [line.split()[0] for line in lines[1:3]] == ["0", "1"]
    assert "of a target of 40%" in out.getvalue()


def test_probes_are_taken_out_again(calibrated):
    loaded = session.load(calibrated)
    before = layers.zigzag_layers(loaded.model)
    with pytest.raises(Killed), probes.probing(loaded.model):
        raise Killed
    after = layers.zigzag_layers(loaded.model)
    assert list(before) == list(after)
    assert all(before[path] is after[path] for path in before)
    assert np.isfinite(before["model.layers.0.mlp.up_proj"].threshold.item())


@pytest.fixture(scope="module")
def auto(converted: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = Path(shutil.copytree(converted, tmp_path_factory.mktemp("auto") / "model"))
    options = dataclasses.replace(OPTIONS, method="auto", sparsity=0.5)
    return folder, options, calibrate.calibrate(folder, options, quiet)


def test_auto_keeps_the_best_and_never_loses_to_uniform(auto):
    _, _, result = auto
    assert {one.name for one in result.tried} == {"uniform", "gradient"}
    scores = [one.kl for one in result.tried]
    assert scores == sorted(scores)
    assert all(len(one.windows) == 2 for one in result.tried)
    assert result.realised == pytest.approx(0.5, abs=0.02)


def test_every_allocation_skips_the_same_fraction(auto):
    for one in auto[2].tried:
        assert one.realised == pytest.approx(0.5, abs=0.02)


def test_allocated_curve_passes_through_the_refined_threshold(auto):
    folder, _, result = auto
    entries = contract.entries(config_json.read_config(folder))
    for row in result.layers:
        spqt = entries[row.path]["spqt"]
        assert thresholds.derive(spqt["curve"], 0.5) == pytest.approx(spqt["threshold"], rel=1e-4)
        assert spqt["curve"] == sorted(spqt["curve"])


def test_killed_among_gradients_resumes_to_the_same_result(auto, converted, tmp_path):
    folder, options, _ = auto
    again = Path(shutil.copytree(converted, tmp_path / "model"))
    with pytest.raises(Killed):
        calibrate.calibrate(again, options, killed_after(9))  # 6 windows of histograms, 3 of gradients
    seen = []
    calibrate.calibrate(again, options, lambda done, total, what: seen.append((done, what)))
    assert seen[0] == (3, "measuring sensitivities by gradients")
    assert without_mirror(again) == without_mirror(folder)


@pytest.mark.parametrize("method", ["auto", "fast", "paper", "uniform"])
def test_each_loop_reports_every_step_of_its_length(folder, method):
    seen: list[tuple[float, float, str]] = []
    calibrate.calibrate(folder, dataclasses.replace(OPTIONS, method=method), lambda *step: seen.append(step))
    for i, (done, total, what) in enumerate(seen):
        last = i + 1 == len(seen) or seen[i + 1][0] == 0
        assert done == (total - 1 if last else seen[i + 1][0] - 1), what


def test_fast_takes_the_gradient_unseen(folder):
    result = calibrate.calibrate(folder, dataclasses.replace(OPTIONS, method="fast"), quiet)
    assert [one.name for one in result.tried] == ["gradient"]
