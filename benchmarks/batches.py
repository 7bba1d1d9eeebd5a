"""Several sequences decoded together against one: `python -m benchmarks.batches MODEL [MODEL ...]`.

Tokens per second of decode steps, prompts not counted, greedy, of all sequences together: 1, 2, 4 and 8 in
mlx-lm's batch and one without, in turns. Each text is compared with the one that its prompt gives alone. The
last line of stdout is one JSON document; the exit code is 1 if a text differs.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import machine

machine.from_bare_tree()

PROMPTS = (
    "Explain why the sky is blue.",
    "Write a Python function that reverses a list.",
    "Tell me about the Roman Empire in a few sentences, and then go on about what came after it.",
    "What is 2 + 2?",
    "Describe how bread is made, from the field to the table.",
    "Name three rivers of Asia.",
    "Write a short story about a lighthouse and the people who keep it through the winter.",
    "What does a compiler do?",
)


def alone(model: Any, prompt: list[int], tokens: int) -> tuple[list[int], float]:
    """Tokens written after a prompt by itself, and seconds of the steps after the first."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    steps = generate_step(mx.array(prompt), model, max_tokens=tokens)
    first, _ = next(steps)
    start = time.perf_counter()
    rest = [int(token) for token, _ in steps]
    return [int(first), *rest], time.perf_counter() - start


def together(model: Any, prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], float]:
    """The same of several prompts at once."""
    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(model, max_tokens=tokens, prefill_batch_size=len(prompts))
    found: dict[int, list[int]] = {uid: [] for uid in generator.insert(prompts)}

    def step() -> bool:
        responses = generator.next_generated()
        for one in responses:
            found[one.uid].append(one.token)
        return bool(responses)

    step()
    start = time.perf_counter()
    while step():
        pass
    return list(found.values()), time.perf_counter() - start


def measure(path: str, counts: list[int], tokens: int, repetitions: int, dense: bool) -> dict[str, Any]:
    """Medians of tokens per second for each number of sequences, and how many texts were as alone."""
    from spqt_cli.decode import session
    from spqt_cli.format import locate

    loaded = session.load(locate.open_folder(path), dense=dense)
    tokenizer = loaded.tokenizer
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        if tokenizer.has_chat_template
        else tokenizer.encode(text)
        for text in PROMPTS[: max(counts)]
    ]
    expected = [alone(loaded.model, prompt, tokens)[0] for prompt in prompts]
    rates: dict[int, list[float]] = {count: [] for count in (0, *counts)}  # 0: one, and no batch
    equal = 0
    for _ in range(repetitions):
        rates[0].append((tokens - 1) / alone(loaded.model, prompts[0], tokens)[1])
        for count in counts:
            found, seconds = together(loaded.model, prompts[:count], tokens)
            rates[count].append(count * (tokens - 1) / seconds)
            equal += found == expected[:count]
    medians = {count: statistics.median(values) for count, values in rates.items()}
    print(f"\n{Path(path).name}{', dense' if dense else ''}: {tokens} tokens\n")
    print("| sequences | tokens/s | times one |\n|---|---|---|")
    for count, rate in medians.items():
        print(f"| {count or 'alone'} | {rate:.1f} | {rate / medians[0]:.2f} |", flush=True)
    return {
        "model": Path(path).name, "dense": dense, "tokens": tokens, "tokens_per_second": medians,
        "texts_as_alone": equal == repetitions * len(counts),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batches", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("models", nargs="+", help="converted folders")
    parser.add_argument(
        "--sequences", type=int, nargs="+", default=[1, 2, 4, 8], help=f"at most {len(PROMPTS)}"
    )
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--output", type=Path, help="a .json file for the result")
    options = parser.parse_args()
    found = [
        measure(model, options.sequences, options.tokens, options.repetitions, options.dense)
        for model in options.models
    ]
    result = json.dumps({"machine": machine.facts(), "models": found})
    print(result)
    if options.output:
        options.output.write_text(result + "\n")
    return 0 if all(one["texts_as_alone"] for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
