"""What drafts of the same weights with more channels skipped would give, verified by dense rows: no loss.

    python -m benchmarks.lossless MODEL [--text FILE] [--sparsity 0.25,0.4,0.5,0.6] [--time] [--output FILE]

MODEL is a calibrated folder whose cache is plain keys and values. A draft reads the cache of the dense rows
before it and the sparse entries of the drafts before it in its chain: that is computed for all positions at
once, a stream for each place in a chain. Measured on a text, which stands for what was written so far, and on
what the dense model itself writes greedily after the first half of each window:

- the sparse model's first choice is the dense one's (greedy text stays equal),
- sum min(p, q): a sampled draft is accepted by the rule min(1, p / q),
- sum p q: it equals a token sampled from p, which is what mlx-lm asks for.

Expected speeds are a calculation from the measured runs and stored results (lossless_costs), and with --time
from tokens and rows timed here on this model. The last line of stdout is one JSON document.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks import lossless_chains as chains
from benchmarks import lossless_costs as costs
from benchmarks.lossless_chains import RULES
from benchmarks.machine import facts
from spqt_cli.decode import phase, session
from spqt_cli.evaluate import variants
from spqt_cli.measure import many_rows, probes, scoring, texts

STEPS = 12  # of each kind, one after another, in a round of --time


def own_text(loaded: session.Loaded, prompt: Sequence[int], count: int) -> list[int]:
    """What the dense model writes greedily after a prompt, up to an end of text."""
    from mlx_lm.generate import generate_step

    session.set_dense(loaded)
    found: list[int] = []
    for token, _ in generate_step(mx.array(prompt), loaded.model, max_tokens=count):
        if int(token) in loaded.tokenizer.eos_token_ids:
            break
        found.append(int(token))
    return found


def measured(
    loaded: session.Loaded, windows: Sequence[chains.Window], share: float, drafts: int
) -> dict[str, Any]:
    """What a share skipped gives: means, with the standard error of the first draft's over windows."""
    masking = probes.Masking(loaded.folder.thresholds(share))
    found: dict[str, list[np.ndarray]] = {rule: [] for rule in RULES}
    with probes.probing(loaded.model) as harness, many_rows.holding(many_rows.spare_bytes()):
        for done, window in enumerate(windows):
            print(f"{share:.0%}: window {done + 1} of {len(windows)}", end="\r", file=sys.stderr)
            logits = chains.logits(loaded.model, harness, masking, window, drafts)
            for rule, chance in chains.accepted(logits).items():
                found[rule].append(chance)
        skipped = probes.weighted(masking.realised(), harness.layers)
    row: dict[str, Any] = {"sparsity": share, "skipped": round(skipped, 4)}
    for rule, chances in found.items():
        firsts = np.array([chance[0].mean() for chance in chances])
        row[rule] = {
            "each": np.mean([chance.mean(axis=1) for chance in chances], axis=0)
            .astype(float)
            .round(4)
            .tolist(),
            "se": round(scoring.standard_error(firsts), 4),
            "accepted": np.mean([chains.means(chance) for chance in chances], axis=0)
            .astype(float)
            .round(4)
            .tolist(),
        }
    return row


def timed(loaded: session.Loaded, shares: Sequence[float], drafts: int, rounds: int) -> costs.Costs:
    """Costs of this model here: tokens and dense rows in turns, after a prompt of 64; medians of rounds."""
    from mlx_lm.models.cache import trim_prompt_cache

    prompt = mx.array([loaded.tokenizer.encode("The history of the town is long. " * 16)[:64]])
    cache = probes.empty_cache(loaded.model)
    loaded.model(prompt, cache=cache)
    ways = [
        (0.0, 1),
        *((share, 1) for share in shares),
        *((0.0, 1 + count) for count in range(1, drafts + 1)),
    ]

    def seconds(share: float, rows: int) -> float:
        session.set_sparsity(loaded, share) if share else session.set_dense(loaded)
        spent = []
        for _ in range(STEPS):
            start = time.perf_counter()
            with phase.decoding():
                mx.eval(loaded.model(prompt[:, :rows], cache=cache)[0, -1].argmax())
            spent.append(time.perf_counter() - start)
            trim_prompt_cache(cache, rows)
        return float(np.median(spent[2:]))

    samples = [[seconds(*way) for way in ways] for _ in range(rounds + 1)][1:]
    ratios = dict(zip(ways, np.median([np.array(one) / one[0] for one in samples], axis=0), strict=True))
    return costs.Costs(
        "this model, timed here",
        facts(),
        {share: float(ratios[share, 1]) for share in shares},
        {rows: float(ratios[0.0, rows]) for share, rows in ways if rows > 1},
    )


def print_runs(kind: str, rows: Sequence[dict[str, Any]]) -> None:
    print(f"\n{kind}\n\n| skipped | {' | '.join(RULES.values())} | accepted of 1 to 4 drafts, greedy |")
    print("|---|---|---|---|---|")
    for row in rows:
        firsts = [f"{row[rule]['each'][0]:.1%} ± {row[rule]['se']:.1%}" for rule in RULES]
        runs = ", ".join(f"{mean:.2f}" for mean in row["greedy"]["accepted"])
        print(f"| {row['skipped']:.0%} | {' | '.join(firsts)} | {runs} |", flush=True)


def print_speeds(kind: str, rows: Sequence[dict[str, Any]], every: Sequence[costs.Costs]) -> None:
    """Expected speeds, greedy: a calculation; in brackets the number of drafts."""
    titles = [f"{row['sparsity']:.0%}" for row in rows]
    print(f"\n{kind}, expected against dense (calculated; in brackets: drafts)\n")
    print(f"| costs of | {' | '.join(titles)} | half, never a wrong draft | half, rows for nothing |")
    print("|---|" + "---|" * (len(titles) + 2))
    half = min(rows, key=lambda row: abs(row["sparsity"] - costs.HALF))
    for one in every:
        cells = [one.speedup(row["sparsity"], row["greedy"]["accepted"]) for row in rows]
        cells.append(one.speedup(half["sparsity"], costs.perfect(len(half["greedy"]["accepted"]))))
        cells.append(one.speedup(half["sparsity"], half["greedy"]["accepted"], rows_free=True))
        print(f"| {one.name} | " + " | ".join(f"{gain:.2f}x ({drafts})" for gain, drafts in cells) + " |")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lossless",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, help="by default the shipped one")
    parser.add_argument("--sparsity", default="0.25,0.4,0.5,0.6")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=256, help="tokens, half of them prompt")
    parser.add_argument("--drafts", type=int, default=4, help="of a chain at most")
    parser.add_argument("--time", type=int, default=0, metavar="ROUNDS", help="time this model here as well")
    parser.add_argument("--label", help="what the model is called in the result")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def texts_of(loaded: session.Loaded, options: argparse.Namespace) -> dict[str, list[chains.Window]]:
    """By kind, the windows to measure: of the text, and of what the dense model writes in them."""
    document, split = texts.read(options.text), options.window // 2
    stream = session.known(loaded, texts.tokens(document, loaded.tokenizer))
    rows = texts.windows(stream, options.window, texts.opening(loaded.tokenizer))
    texts.need(rows, options.windows, document)
    found = rows[: options.windows].tolist()
    written = [one[:split] + own_text(loaded, one[:split], split) for one in found]
    least = split + 2 * options.drafts  # an answer that ends at once has no chain
    return {
        "the text": [chains.Window(one, split) for one in found],
        "its own greedy text": [chains.Window(one, split) for one in written if len(one) > least],
    }


def speeds(rows: Sequence[dict[str, Any]], one: costs.Costs) -> list[dict[str, Any]]:
    """What a model's runs would give at some costs, by rule and share."""
    found = []
    for rule in RULES:
        for row in rows:
            gain, drafts = one.speedup(row["sparsity"], row[rule]["accepted"])
            found.append(
                {"rule": rule, "sparsity": row["sparsity"], "gain": round(gain, 4), "drafts": drafts}
            )
    return found


def main() -> None:
    options = parse()
    loaded = session.load(options.model, dense=True)
    if any(type(one).__name__ != "KVCache" for one in probes.empty_cache(loaded.model)):
        sys.exit(f"{options.model}: its cache is more than the keys and values of all tokens")
    shares = variants.parse_sparsities(options.sparsity)
    loaded.folder.thresholds(max(shares))  # refused before anything runs
    kinds = texts_of(loaded, options)
    every = costs.stored()
    if options.time:
        every.append(timed(loaded, shares, options.drafts, options.time))
        session.set_dense(loaded)
    result: dict[str, Any] = {
        "machine": facts(),
        "model": options.label or Path(options.model).name,
        "text": Path(options.text).name if options.text else texts.SHIPPED,
        "window": options.window,
        "costs": [one.described() for one in every],
    }
    for kind, windows in kinds.items():
        rows = [measured(loaded, windows, share, options.drafts) for share in shares]
        print_runs(kind, rows)
        print_speeds(kind, rows, every)
        result[kind] = {
            "windows": len(windows),
            "positions": sum(len(window.tokens) - 1 - window.split for window in windows),
            "shares": rows,
            "expected": {one.name: speeds(rows, one) for one in every},
        }
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
