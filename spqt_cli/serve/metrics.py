"""What the server counts, and the text that Prometheus reads (exposition format 0.0.4)."""

import threading
from collections import Counter, deque
from collections.abc import Iterable

WINDOW_SECONDS = 10.0  # of decoding, over which the rate of tokens is taken
SAMPLE_SECONDS = 0.1  # of decoding, between two that are kept
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Sample = tuple[dict[str, str], float]


class Metrics:
    """Counts of one server; each method may be called from any thread.

    skipped_share: fraction of Zigzag weights skipped, the mean over tokens decoded since the start.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.tokens = self.prompt_tokens = 0
        self._requests: Counter[tuple[str, str]] = Counter()
        self._seconds, self._decoded = 0.0, 0  # spent decoding, and the tokens that came of it
        self._until = 0.0  # what was decoded till then is counted
        self._recent: deque[tuple[float, int]] = deque([(0.0, 0)])  # those two as they were
        self._skipped = self._of_tokens = 0.0

    def token(self) -> None:
        """One token was generated."""
        with self._lock:
            self.tokens += 1

    def step(self, before: float, now: float) -> None:
        """A decode step gave a request a token at `now`; `before`, it had its last one. Both in seconds.

        Requests that decode together share the time that they take.
        """
        with self._lock:
            self._seconds += max(0.0, now - max(before, self._until))
            self._until = max(now, self._until)
            self._decoded += 1
            if self._seconds - self._recent[-1][0] > SAMPLE_SECONDS:
                self._recent.append((self._seconds, self._decoded))
            while len(self._recent) > 1 and self._recent[1][0] <= self._seconds - WINDOW_SECONDS:
                self._recent.popleft()

    def prompt(self, tokens: int) -> None:
        """A prompt was taken."""
        with self._lock:
            self.prompt_tokens += tokens

    def request(self, path: str, status: int | str) -> None:
        """A request was answered; status "closed" where the client left before."""
        with self._lock:
            self._requests[path, str(status)] += 1

    def skipped(self, share: float, tokens: int) -> None:
        """So many tokens skipped that share of the Zigzag weights, 0 to 1."""
        with self._lock:
            self._skipped += share * tokens
            self._of_tokens += tokens

    @property
    def skipped_share(self) -> float:
        """0 before anything was decoded."""
        return self._skipped / self._of_tokens if self._of_tokens else 0.0

    def tokens_per_second(self) -> float:
        """Of all requests together, over the last seconds spent decoding; 0 before there were any."""
        with self._lock:
            seconds, tokens = self._recent[0]
            spent = self._seconds - seconds
            return (self._decoded - tokens) / spent if spent else 0.0

    def requests(self) -> list[Sample]:
        """Each path and status with its count."""
        with self._lock:
            return [({"path": path, "status": status}, n) for (path, status), n in self._requests.items()]


def line(name: str, kind: str, about: str, samples: Iterable[Sample] | float) -> str:
    """One metric as Prometheus reads it. samples: labels and value of each, or one value."""
    if isinstance(samples, (int, float)):
        samples = [({}, samples)]
    rows = [f"# HELP spqt_{name} {about}", f"# TYPE spqt_{name} {kind}"]
    for labels, value in samples:
        inside = ",".join(f'{key}="{_escaped(one)}"' for key, one in labels.items())
        rows.append(f"spqt_{name}{{{inside}}} {value:.10g}" if inside else f"spqt_{name} {value:.10g}")
    return "\n".join(rows) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
