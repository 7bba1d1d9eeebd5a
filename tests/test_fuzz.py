"""Two thousand damaged models: refused or accepted, never a crash. More of them: `make torture`."""

from pathlib import Path

import pytest

from tests.hostile import attempt, prepare

CASES, BLOCKS = 2000, 8


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return prepare(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize("block", range(BLOCKS))
def test_damaged_models(block: int, sound: dict[str, Path], tmp_path: Path) -> None:
    outcomes = set()
    for seed in range(block * CASES // BLOCKS, (block + 1) * CASES // BLOCKS):
        try:
            outcomes.add(attempt(seed, sound, tmp_path))
        except Exception as error:
            raise AssertionError(f"seed {seed} broke the promise") from error
    # the damage must be such that some cases pass and some fail
    assert {"accepted", "refused with exit 3", "refused with exit 4"} <= outcomes
