"""At least 80 % of what a token reads is Zigzag in the families that people run, by their published sizes."""

import pytest

from benchmarks import expert_shares
from spqt_cli.bench import shapes

# With experts left row-grouped: what could be skipped before, in percent.
ROW_GROUPED = {
    "qwen3-30b-a3b": 29, "gpt-oss-20b": 17, "mixtral-8x7b": 11,
    "deepseek-v3": 38, "glm-4.5-air": 46, "minimax-m2": 26,
}  # fmt: skip


@pytest.mark.parametrize("name", ROW_GROUPED)
def test_share_by_published_sizes(name: str) -> None:
    config = shapes.config(name)
    assert expert_shares.reads(config, True).skippable >= 0.8
    before = expert_shares.reads(config, False)
    assert round(100 * before.skippable) == ROW_GROUPED[name]
    assert before.experts == f"{config['num_experts_per_tok']} of {experts_of(config)} experts"


def experts_of(config: dict[str, int]) -> int:
    keys = ("num_experts", "n_routed_experts", "num_local_experts")
    return next(config[key] for key in keys if key in config)
