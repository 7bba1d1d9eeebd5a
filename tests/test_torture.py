"""Twenty killed runs: what is there is old or complete, and the resumed result is byte-equal."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lib.hostile import prepare
from tests.torture import Kills, calibrate, convert, fuzz_batch, load_state

KILLS = 10  # of each kind of run


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return prepare(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize("job", [convert, calibrate])
def test_fault_53_random_kills(
    job: Callable[[Path, Path], None], sound: dict[str, Path], tmp_path: Path
) -> None:
    kills = Kills(job, sound, tmp_path)
    ends = {seed: kills.once(seed) for seed in range(KILLS)}
    assert not {seed: problem for seed, (problem, _) in ends.items() if problem}
    assert any("amid" in strikes for _, strikes in ends.values())  # else nothing was interrupted


def test_the_command_notes_seeds_and_outcomes(sound: dict[str, Path], tmp_path: Path) -> None:
    state = load_state(tmp_path / "none.json")
    assert fuzz_batch(7, 20, sound, state) == 20
    assert sum(state["outcomes"].values()) == 20
    assert state["failures"] == []
    assert state["peak_rss_bytes"] > 0


def test_the_command_notes_a_broken_promise(tmp_path: Path) -> None:
    state = load_state(tmp_path / "none.json")
    fuzz_batch(0, 3, {"llama": tmp_path / "absent"}, state)  # copying fails, which is no SpqtError
    assert len(state["failures"]) == 3
    assert "seed 0" in state["failures"][0]
