"""Five greedy texts, dense and sparse: what skipping does to what a model writes.

    python benchmarks/texts.py --model models/SmolLM2-135M-Instruct-spqt-4bit --sparsity 0.25

Writes benchmarks/results/texts-<model>.json and .md: each text, its perplexity by the dense model, whether an
8-gram occurs three times, and the ratio of mean perplexities (exp of the mean loss over all tokens).
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path

from machine import facts

from spqt_cli.backends import select
from spqt_cli.decode import generate, session
from spqt_cli.decode.options import Options, Prompt, Sampling
from spqt_cli.evaluate import compare

# Prompts whose dense greedy text does not loop by itself at 96 tokens, so that a loop is sparsity's doing.
# Left out for looping densely: "What are the main differences between a cat and a dog as pets?"
PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper who finds a bottle on the beach.",
    "Give three tips for a good night's sleep.",
    "Give me a simple recipe for vegetable soup, step by step.",
    "Write a polite email to a colleague asking to move a meeting to Thursday.",
)


def repeats_thrice(text: str, size: int = 8) -> bool:
    """True where some run of `size` words occurs three times."""
    words = text.split()
    runs = Counter(tuple(words[at : at + size]) for at in range(len(words) - size + 1))
    return max(runs.values(), default=0) >= 3


def measure(loaded: session.Loaded, prompt: str, sparsity: float, max_tokens: int) -> dict:
    """One text and the dense model's loss over it."""
    tokens = generate.encode(loaded, Prompt(prompt))
    session.set_sparsity(loaded, sparsity)
    options = Options(max_tokens=max_tokens)
    *pieces, statistics = generate.stream(loaded, tokens, Sampling(), options)
    session.set_sparsity(loaded, 0)
    text = "".join(pieces)
    perplexity = compare.perplexity(loaded, tokens, text)
    return {
        "prompt": prompt,
        "text": text,
        "tokens": statistics.generation_tokens,
        "skipped": round(statistics.sparsity, 4),
        "perplexity_by_dense": round(perplexity, 3),
        "an_8_gram_three_times": repeats_thrice(text),
    }


def mean_perplexity(rows: list[dict]) -> float:
    losses = sum(math.log(row["perplexity_by_dense"]) * row["tokens"] for row in rows)
    return math.exp(losses / sum(row["tokens"] for row in rows))


def as_markdown(result: dict) -> str:
    lines = [f"# Five greedy texts: {result['model']}", "", f"`{result['command']}`, {result['machine']}", ""]
    for name in ("dense", "sparse"):
        lines.append(f"Mean perplexity by the dense model, {name}: {result[name]['mean_perplexity']:.3f}  ")
    lines += [f"Ratio: {result['ratio']:.3f}", ""]
    for name in ("dense", "sparse"):
        for row in result[name]["texts"]:
            title = f"## {name}, {row['skipped']:.1%} skipped, perplexity {row['perplexity_by_dense']}"
            lines += [title, "", f"> {row['prompt']}", "", row["text"].strip(), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    loaded = session.load(arguments.model)
    name = arguments.model.name
    result: dict = {
        "model": name,
        "command": f"python benchmarks/texts.py --model {name} --sparsity {arguments.sparsity:g} "
        f"--max-tokens {arguments.max_tokens}",
        "machine": f"{facts()}, backend {select.backend().name}",
    }
    for label, share in (("dense", 0.0), ("sparse", arguments.sparsity)):
        rows = [measure(loaded, prompt, share, arguments.max_tokens) for prompt in PROMPTS]
        result[label] = {"mean_perplexity": mean_perplexity(rows), "texts": rows}
    result["ratio"] = result["sparse"]["mean_perplexity"] / result["dense"]["mean_perplexity"]
    stem = arguments.output / f"texts-{name}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    stem.with_suffix(".md").write_text(as_markdown(result))
    print(json.dumps({"ratio": result["ratio"], "repeats": [r["an_8_gram_three_times"] for r in rows]}))


if __name__ == "__main__":
    main()
