"""What the server counts, and the text that Prometheus reads (exposition format 0.0.4)."""

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable

WINDOW_SECONDS = 10.0  # over which the rate of tokens is taken
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
        self._recent: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])  # (when, tokens till then)
        self._skipped = self._of_tokens = 0.0

    def token(self) -> None:
        """One token was generated."""
        with self._lock:
            self.tokens += 1
            now = time.monotonic()
            if now - self._recent[-1][0] > 0.1:
                self._recent.append((now, self.tokens))
            self._forget(now)

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
        """Of all requests together, over the last seconds."""
        with self._lock:
            now = time.monotonic()
            self._forget(now)
            since, before = self._recent[0]
            return (self.tokens - before) / max(now - since, 1.0)

    def _forget(self, now: float) -> None:
        while len(self._recent) > 1 and self._recent[1][0] < now - WINDOW_SECONDS:
            self._recent.popleft()
        if now - self._recent[-1][0] > WINDOW_SECONDS:
            self._recent = deque([(now, self.tokens)])

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
