"""What part of the weights that a token reads is Zigzag, of mixtures of experts: from published sizes alone.

    python -m benchmarks.expert_shares [SHAPE ...]

Shapes are those of `spqt bench --shape`, all mixtures by default; the plan is that of `spqt convert`, 4 bits
in groups of 64, and the same with experts left row-grouped. No weight is computed. The last line of stdout is
one JSON document.
"""

import argparse
import json
import sys
from typing import Any

from benchmarks import machine

machine.from_bare_tree()

EXPERTS = ("gate_proj", "up_proj", "down_proj")
HALF = 0.5


def reads(config: dict[str, Any], experts: bool) -> Any:
    """What a token reads of a model of that config, its experts Zigzag or not."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from spqt_cli.convert import parameters, plan

    model = parameters.build(config, config["model_type"])
    held = ("switch_mlp", "experts")  # what mlx-lm's classes call a module of experts
    skip = () if experts else tuple(f".{one}.{name}" for one in held for name in EXPERTS)
    decide = plan.Decisions(model, plan.Wishes(skip=skip), config)
    arrays = dict(tree_flatten(model.parameters()))
    units = [
        decide.unit(name, mx.zeros(array.shape, mx.bfloat16), "bfloat16", None)
        for name, array in arrays.items()
    ]
    planned = plan.Plan(units, decide.quantization, "bfloat16", experts=decide.fractions.experts)
    return planned.account(HALF, "half skipped")


def main() -> int:
    from spqt_cli.bench import shapes

    mixtures = [name for name in shapes.names() if "num_experts_per_tok" in shapes.config(name)]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.expert_shares", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("shapes", nargs="*", help=f"by default {', '.join(mixtures)}")
    found = []
    print("| model | MB read a token | Zigzag | at half at most | experts row-grouped | at half at most |")
    print("|---|---|---|---|---|---|")
    for name in parser.parse_args().shapes or mixtures:
        ours, before = (reads(shapes.config(name), experts) for experts in (True, False))
        print(
            f"| {name} | {ours.bytes / 1e6:.0f} | {ours.skippable:.0%} | {ours.gain:.2f}x "
            f"| {before.skippable:.0%} | {before.gain:.2f}x |"
        )
        found.append({"model": name, "zigzag": ours.skippable, "row_grouped": before.skippable})
    print(json.dumps({"spqt": machine.commit(), "models": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
