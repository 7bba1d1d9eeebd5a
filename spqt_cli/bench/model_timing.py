"""Times the variants of a model, one after another in each repetition, and makes the rows of the report.

It knows models, thresholds and meters; it knows nothing of options, tables or the command line.
"""

import contextlib
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from spqt_cli.backends import select
from spqt_cli.bench import hardware, models, quiet_host, results
from spqt_cli.bench.models import Subject
from spqt_cli.bench.results import ModelRow, Stat
from spqt_cli.decode import active_counts, profile, relayout
from spqt_cli.decode.layers import zigzag_layers
from spqt_cli.decode.only_mlx import check_unpatched, only_mlx
from spqt_cli.decode.session import weight_bytes

WARM_TOKENS = 2  # decoded before the clock starts: kernels are built, the pipeline is full
LEAST_ENERGY_SECONDS = 1.0  # of measurement: counters step every tenth of a second or so


@dataclass(frozen=True)
class Test:
    """What is timed: `prompt` or `decode`, of so many tokens, after `depth` tokens of context."""

    kind: str
    tokens: int
    depth: int

    @property
    def name(self) -> str:
        """As llama-bench writes it: pp512, tg64."""
        return f"{'tg' if self.kind == 'decode' else 'pp'}{self.tokens}"

    @property
    def decodes(self) -> bool:
        return self.kind == "decode"


class Peer(Protocol):
    """Another program on a model of the same shape. note: what a reader must know of it."""

    name: str
    note: str

    def rate(self, test: Test) -> float:
        """Tokens per second of one sample."""
        ...  # pragma: no cover

    @property
    def weight_bytes(self) -> int: ...  # pragma: no cover


@dataclass
class Variant:
    """A way to run the subject.

    side: whose model, `stock` or `zigzag`. thresholds: by path, of the layers that skip. rows: paths of
    the layers that the stock model's row-grouped ones stand in for. zigzag_head: the head in that layout.
    """

    name: str
    side: str
    sparsity: float | None
    thresholds: dict[str, mx.array] = field(default_factory=dict)
    rows: frozenset[str] = frozenset()
    zigzag_head: bool = False


@dataclass
class Trial:
    """The samples of one variant in one test.

    rates: tokens/s; host_us: a fixed Python loop before and after each; the rest is added up or the largest.
    """

    rates: list[float] = field(default_factory=list)
    host_us: list[tuple[float, float]] = field(default_factory=list)
    densities: list[tuple[Any, float]] = field(default_factory=list)
    working_bytes: int = 0
    seconds: float = 0.0
    joules: float | None = 0.0
    tokens: int = 0


class Runs:
    """One subject under measurement: its layers, this device's profile, the meters."""

    def __init__(
        self,
        subject: Subject,
        sparsities: Sequence[float],
        energy: hardware.Energy,
        copy_bandwidth: float,
        peers: Sequence[Peer] = (),
    ) -> None:
        self.subject, self.sparsities, self.peers = subject, sparsities, peers
        self.energy, self.copy_bandwidth = energy, copy_bandwidth
        self.host = quiet_host.Watch()
        self.layers = zigzag_layers(subject.zigzag)
        self.units = profile.units(subject.zigzag)
        self.stock_layers = dict(subject.stock.named_modules())
        self.choices, fault = profile.read() if subject.processes is None else ({}, "")  # of whole layers
        self.head = relayout.find_head(subject.zigzag)
        self.other_head: nn.Module | None = None
        choice = self.choices.get(self.head.key) if self.head is not None else None
        if self.head is not None and choice is not None and choice.otherwise == profile.ZIGZAG:
            self.other_head = relayout.zigzag_head(self.head)
        self.notes = [fault] if fault else []

    def run(
        self, test: Test, repetitions: int, on_progress: Callable[[float, str], None], rest_seconds: float = 0
    ) -> list[ModelRow]:
        """The rows of one test: all variants, interleaved, with a rest after each repetition."""
        what = f"{test.name} at depth {test.depth}"
        on_progress(0, f"{what}: filling the cache")
        caches = models.caches(self.subject, test.depth)
        variants = self.variants(test, caches["zigzag"])
        trials = [Trial() for _ in variants]
        others = [Trial() for _ in self.peers]
        for repetition in range(repetitions + 1):
            for at, (variant, trial) in enumerate(zip(variants, trials, strict=True)):
                on_progress((repetition + at / len(variants)) / (repetitions + 1), f"{what}: {variant.name}")
                counted = trial if repetition else Trial()  # the first repetition warms up
                self.sample(test, variant, caches[variant.side], counted)
            for peer, trial in zip(self.peers, others, strict=True):
                on_progress((repetition + 1) / (repetitions + 1), f"{what}: {peer.name}")
                self.ask(test, peer, trial if repetition else Trial())
            time.sleep(rest_seconds)
        stock = Stat(trials[0].rates)
        rows = [self.row(test, *pair, stock) for pair in zip(variants, trials, strict=True)]
        return rows + [self.peer_row(test, *pair, stock) for pair in zip(self.peers, others, strict=True)]

    def judge(self, rows: list[ModelRow]) -> list[bool]:
        """Record in a test's rows in which repetitions the host was quiet, and return that; after all tests.

        A row's ratio to stock takes the host's times around its own sample and around stock's.
        """
        stock = rows[0]
        for row in rows:
            quiet = self.host.quiet([stock.host_us, row.host_us])
            row.quiet_host = quiet_host.Quiet(quiet, row.speedup.samples)
        return self.host.quiet([row.host_us for row in rows])

    def variants(self, test: Test, cache: list[Any]) -> list[Variant]:
        """Stock first. Prompts run densely whatever the thresholds, so they have no sparse variant."""
        result = [Variant("zigzag dense", "zigzag", 0.0)]
        for sparsity in filter(None, self.sparsities if test.decodes else ()):
            thresholds = self.subject.thresholds(sparsity, cache, WARM_TOKENS + test.tokens)
            result.append(Variant(f"sparse {sparsity:.0%}", "zigzag", sparsity, thresholds))
        followed = [self.profiled(variant) for variant in result]
        return [Variant("stock", "stock", None), *result, *(one for one in followed if one is not None)]

    def profiled(self, variant: Variant) -> Variant | None:
        """The variant with this device's profile followed; None where that changes nothing."""
        wanted = 1 - (variant.sparsity or 0.0)
        thresholds = dict(variant.thresholds)
        rows: set[str] = set()
        for unit in self.units:
            choice = self.choices.get(unit.key)
            what = profile.SPARSE if choice is None else profile.way(choice, unit, wanted)
            if what == profile.ROWS:
                rows.update(unit.layers)
            if what != profile.SPARSE:
                for path in unit.layers:
                    thresholds.pop(path, None)
        other_head = self.other_head is not None
        if not rows and not other_head and len(thresholds) == len(variant.thresholds):
            return None
        name = f"{variant.name}, profile"
        return Variant(name, "zigzag", variant.sparsity, thresholds, frozenset(rows), other_head)

    def prepare(self, variant: Variant) -> nn.Module:
        """The variant's model, in the variant's state."""
        if variant.side == "stock":
            return self.subject.stock
        places: list[tuple[str, nn.Module]] = [
            (path, self.stock_layers[path] if path in variant.rows else layer)
            for path, layer in self.layers.items()
        ]
        if self.head is not None and self.other_head is not None:
            head = self.other_head if variant.zigzag_head else self.head.module
            places.append((self.head.path, head))
        self.subject.zigzag.update_modules(tree_unflatten(places))
        for path, layer in self.layers.items():
            layer.set_threshold(variant.thresholds.get(path))
        return self.subject.zigzag

    @contextlib.contextmanager
    def surroundings(self, variant: Variant, model: nn.Module) -> Iterator[None]:
        """Nothing of ours where the stock model runs, and that is checked."""
        if variant.side != "stock":
            yield
            return
        with only_mlx():
            check_unpatched(model)
            yield

    def sample(self, test: Test, variant: Variant, cache: list[Any], trial: Trial) -> None:
        """Run once and add the results to `trial`; the cache is left as it was."""
        from mlx_lm.generate import generation_stream, wired_limit
        from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

        model = self.prepare(variant)
        trims = can_trim_prompt_cache(cache)
        used = cache if trims else copy.deepcopy(cache)
        mx.eval([entry.state for entry in used])
        mx.synchronize()
        held, before = _cache_bytes(used), mx.get_active_memory()
        mx.reset_peak_memory()
        streams: list[Any] = [generation_stream]
        host_us = self.host.look()
        joules, start = self.energy.joules(), time.perf_counter()
        quietly = contextlib.redirect_stdout(sys.stderr)  # mlx-lm prints a warning about large models
        limit = wired_limit(model, streams)
        counting = active_counts.counting(select.backend().count_every)
        with quietly, self.surroundings(variant, model), limit, counting as counter:
            if test.decodes:
                tokens = WARM_TOKENS + test.tokens
                rate = _decode_rate(model, self.subject.prompt(test.depth, 1), used, tokens)
            else:
                tokens = test.tokens
                rate = _prompt_rate(model, self.subject.prompt(test.depth, tokens), used)
            mx.synchronize(generation_stream)
        trial.rates.append(rate)
        trial.seconds += time.perf_counter() - start
        trial.tokens += tokens + 1  # mlx-lm's loop runs one step ahead of what it yields
        spent = _spent(joules, self.energy.joules())
        trial.host_us.append((host_us, self.host.look()))
        trial.joules = None if spent is None or trial.joules is None else trial.joules + spent
        trial.working_bytes = max(trial.working_bytes, held + mx.get_peak_memory() - before)
        trial.densities += counter.densities()
        if trims:
            trim_prompt_cache(used, tokens + 1)

    def ask(self, test: Test, peer: Peer, trial: Trial) -> None:
        """Let another program run once and add its rate to `trial`; nothing of ours runs meanwhile."""
        mx.synchronize()
        host_us = self.host.look()
        trial.rates.append(peer.rate(test))
        trial.host_us.append((host_us, self.host.look()))

    def peer_row(self, test: Test, peer: Peer, trial: Trial, stock: Stat) -> ModelRow:
        """As `row`; energy and working memory of another program are not measured."""
        rate = Stat(trial.rates)
        read = float(peer.weight_bytes) if test.decodes else None
        bandwidth = read * rate.median if read else None
        return ModelRow(
            test=test.name,
            depth=test.depth,
            variant=peer.name,
            sparsity=None,
            skipped=None,
            rate=rate,
            speedup=results.ratio(rate, stock, of_times=False),
            weight_bytes=read,
            bandwidth=bandwidth,
            copy_share=bandwidth / self.copy_bandwidth if bandwidth else None,
            memory_bytes=peer.weight_bytes,
            joules=None,
            host_us=trial.host_us,
        )

    def row(self, test: Test, variant: Variant, trial: Trial, stock: Stat) -> ModelRow:
        """What the samples amount to."""
        rate = Stat(trial.rates)
        model = self.prepare(variant)
        other, zigzag = weight_bytes(model, self.subject.config)
        density = _means(trial.densities)
        read = sum(size * density.get(key, 1.0) for key, size in zigzag.items())
        dense = sum(zigzag.values())
        bandwidth = (other + read) * rate.median if test.decodes else None
        timed = trial.seconds >= LEAST_ENERGY_SECONDS and trial.joules is not None
        return ModelRow(
            test=test.name,
            depth=test.depth,
            variant=variant.name,
            sparsity=variant.sparsity,
            skipped=1 - read / dense if dense and test.decodes else None,
            rate=rate,
            speedup=results.ratio(rate, stock, of_times=False),
            weight_bytes=other + read if test.decodes else None,
            bandwidth=bandwidth,
            copy_share=bandwidth / self.copy_bandwidth if bandwidth else None,
            memory_bytes=sum(a.nbytes for a in models.arrays(model).values()) + trial.working_bytes,
            joules=trial.joules / trial.tokens if timed and trial.joules is not None else None,
            host_us=trial.host_us,
        )


def _spent(before: float | None, after: float | None) -> float | None:
    """Joules between two readings; None where there are none, or the counter began anew."""
    return None if before is None or after is None or after < before else after - before


def _cache_bytes(cache: list[Any]) -> int:
    arrays = dict(tree_flatten([entry.state for entry in cache])).values()
    return sum(array.nbytes for array in arrays if isinstance(array, mx.array))


def _means(densities: list[tuple[Any, float]]) -> dict[int, float]:
    """Layer's id -> its mean density over all runs."""
    by_layer: dict[int, list[float]] = {}
    for layer, density in densities:
        by_layer.setdefault(id(layer), []).append(density)
    return {key: statistics.fmean(values) for key, values in by_layer.items()}


def _decode_rate(model: nn.Module, prompt: mx.array, cache: list[Any], tokens: int) -> float:
    """Tokens per second of decoding `tokens` tokens, the first WARM_TOKENS not timed."""
    from mlx_lm.generate import generate_step

    times = [time.perf_counter() for _ in generate_step(prompt, model, max_tokens=tokens, prompt_cache=cache)]
    return (tokens - WARM_TOKENS) / (times[-1] - times[WARM_TOKENS - 1])


def _prompt_rate(model: nn.Module, prompt: mx.array, cache: list[Any]) -> float:
    """Tokens per second from a prompt's start to its first answer token, as mlx-lm reports it."""
    from mlx_lm.generate import generate_step

    steps = generate_step(prompt, model, max_tokens=1, prompt_cache=cache)
    start = time.perf_counter()
    next(steps)
    rate = prompt.size / (time.perf_counter() - start)
    for _ in steps:
        pass
    return rate
