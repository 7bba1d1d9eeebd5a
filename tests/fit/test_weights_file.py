"""Tensors overwritten in place, states on disk, and the words for a time."""

import shutil

import mlx.core as mx
import numpy as np
import pytest

from spqt_cli.errors import SpqtError
from spqt_cli.fit import cost, masks
from spqt_cli.fit.store import Store
from spqt_cli.fit.weights_file import WeightsFile
from spqt_cli.format.folder import Folder
from spqt_cli.measure import many_rows


@pytest.fixture
def folder(converted, tmp_path):
    return shutil.copytree(converted, tmp_path / "model")


def test_a_tensor_is_replaced_and_no_other(folder):
    before = mx.load(str(folder / "model.safetensors"))
    path = next(iter(Folder(folder).layers))
    scales = before[f"{path}.scales"] * 2
    with WeightsFile(folder) as file:
        old = file.sha256(f"{path}.scales")
        file.write(f"{path}.scales", scales)
        assert file.sha256(f"{path}.scales") != old
        file.finish("fit", {"method": "test"})
    after = mx.load(str(folder / "model.safetensors"))
    assert {name for name in before if not mx.array_equal(before[name], after[name])} == {f"{path}.scales"}
    assert mx.array_equal(after[f"{path}.scales"], scales)
    assert Folder(folder).verify()


def test_until_it_is_finished_the_folder_is_not_taken_for_sound(folder):
    path = next(iter(Folder(folder).layers))
    with WeightsFile(folder) as file:
        file.write(f"{path}.scales", mx.load(str(folder / "model.safetensors"))[f"{path}.scales"] * 2)
    with pytest.raises(SpqtError):
        Folder(folder).verify()


def test_finishing_twice_changes_nothing(folder):
    for _ in range(2):
        with WeightsFile(folder) as file:
            file.finish("fit", {"method": "test"})
        found = [path.read_bytes() for path in sorted(folder.iterdir())]
    with WeightsFile(folder) as file:
        file.finish("fit", {"method": "test"})
    assert found == [path.read_bytes() for path in sorted(folder.iterdir())]


def test_another_size_is_refused(folder):
    path = next(iter(Folder(folder).layers))
    with WeightsFile(folder) as file, pytest.raises(ValueError, match="bytes"):
        file.write(f"{path}.scales", mx.zeros((1, 1, 1)))


def test_states_come_back_and_torn_ones_are_noticed(tmp_path):
    store = Store(tmp_path / "states")
    large = mx.array([1e5, -2.0])
    store.save("a-0-0", large, short=True)
    store.save("a-0-1", mx.array([0.1, 2.0]), short=True)
    assert mx.array_equal(store.load("a-0-0"), large)  # does not fit float16
    assert mx.allclose(store.load("a-0-1"), mx.array([0.1, 2.0]), rtol=1e-3)
    torn = tmp_path / "states" / "a-0-0.npy"
    torn.write_bytes(torn.read_bytes()[:-4])
    assert not store.has("a-0-0")
    assert store.has("a-0-1")
    store.drop("a-0-*")
    assert not store.has("a-0-1")


def test_a_gpu_holds_what_fits_and_disk_takes_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(many_rows, "on_cpu", lambda: False)
    store, folder = Store(tmp_path / "states", room=8), tmp_path / "states"
    store.save("a-0", mx.array([0.1, 2.0]), short=True)
    store.save("a-1", mx.array([1e5, -2.0]), short=True)  # does not fit float16, nor the room left
    store.save("a-2", mx.array([0.3]), short=True)
    store.save("b-0", mx.array([0.4]))
    assert sorted(path.stem for path in folder.iterdir()) == ["a-1", "b-0"]
    assert all(store.has(name) for name in ("a-0", "a-1", "a-2", "b-0"))
    assert store.load("a-0").dtype == mx.float32
    assert mx.allclose(store.load("a-0"), mx.array([0.1, 2.0]), rtol=1e-3)
    assert mx.array_equal(store.load("a-1"), mx.array([1e5, -2.0]))
    store.drop("a-*")
    assert not any(store.has(name) for name in ("a-0", "a-1", "a-2"))
    store.save("a-3", mx.array([0.1, 0.2, 0.3, 0.4]), short=True)  # in the room that was given back
    assert not (folder / "a-3.npy").exists()


def test_what_a_stopped_run_asks_for_is_held_and_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(many_rows, "on_cpu", lambda: False)
    store, folder = Store(tmp_path / "states", room=8), tmp_path / "states"
    store.save("x-0-0", mx.array([1.0, 2.0]))
    store.save("x-0-1", mx.array([3.0]))  # no room
    store.save("x-0-0", mx.array([1.5]))  # anew: the first one's room is free again
    assert mx.array_equal(store.load("x-0-0"), mx.array([1.5]))
    assert mx.array_equal(Store(folder).load("x-0-0"), mx.array([1.5]))
    (folder / "x-0-0.npy").unlink()
    (folder / "x-0-1.npy").unlink()
    assert store.has("x-0-0")
    assert not store.has("x-0-1")
    store.drop("x-0-*")
    assert not store.has("x-0-0")


def test_a_threshold_leaves_its_share_below():
    x = np.random.default_rng(0).standard_normal((64, 300)).astype(np.float32)
    assert np.mean(np.abs(x) < masks.threshold(x, 0.4)) == pytest.approx(0.4, abs=0.01)
    assert masks.threshold(x, 1.0) == np.abs(x).max()
    assert masks.threshold(mx.array(x), 0.4) == masks.threshold(x, 0.4)


def test_decode_steps_come_after_a_prompt():
    assert masks.decode_rows(mx.zeros((2, 8, 4)), 8, 4) == slice(4, 8)
    assert masks.decode_rows(mx.zeros((2, 8, 4)), 8, 2) == slice(2, 8)
    assert masks.decode_rows(mx.zeros((2, 7, 4)), 8, 4) is None
    assert masks.decode_rows(mx.zeros((16, 4)), 8, 4) is None


@pytest.mark.parametrize(
    ("seconds", "words"), [(3, "about 10 seconds"), (240, "about 4 minutes"), (20000, "about 6 hours")]
)
def test_words(seconds, words):
    assert cost.words(seconds) == words
