"""Load on `spqt serve`: many clients at once, and many malformed requests, against one model.

    python -m benchmarks.serve load MODEL [--clients 64] [--seconds 600] [--output FILE]
    python -m benchmarks.serve malformed MODEL [--requests 10000] [--seed 0] [--output FILE]

`load`: OpenAI's client in threads, half of them streaming, some of which leave early. The rule: no status of
500 or above, and a resident set that grows by less than 5 % between a tenth of the time and the end.
`malformed`: seeded requests, each of them wrong in one way. The rule: each gets a status from 400 to 499, and
afterwards the server is healthy and answers. The last line of stdout is one JSON document; the exit code is 1
if the rule is broken.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks import machine

DRIFT = 0.05
NAME = "model"
WORDS = ("the quick brown fox", "jumps over", "a lazy dog", "pack my box", "with five dozen", "liquor jugs")


@contextmanager
def serving(model: str, *flags: object) -> Iterator[tuple[int, psutil.Process]]:
    """A server in a process of its own: (port, the process that runs the model)."""
    command = [sys.executable, "-m", "spqt_cli", "serve", model, "--port", "0", "--served-model-name", NAME]
    environment = {**os.environ, "SPQT_WORKER": str(os.getpid())}  # in the process that is started
    server = subprocess.Popen(
        [*command, *map(str, flags)], stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        said = ""
        while "serving" not in said:
            said = server.stderr.readline()
            if not said:
                raise SystemExit(f"the server ended with {server.wait()}")
        print(said.strip(), file=sys.stderr)
        threading.Thread(target=server.stderr.read, daemon=True).start()
        yield int(said.split(" | ")[0].rpartition(":")[2]), psutil.Process(server.pid)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


class Clients:
    """Threads that ask until the time is over. statuses: of all answers; broken: those without one."""

    def __init__(self, port: int, count: int, seconds: float) -> None:
        self.port, self.end = port, time.monotonic() + seconds
        self.statuses: Counter[str] = Counter()
        self.tokens = 0
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(seed,)) for seed in range(count)]

    def run(self) -> None:
        """Start them and wait."""
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join()

    def _ask(self, seed: int) -> None:
        import openai

        rng = random.Random(seed)
        url = f"http://127.0.0.1:{self.port}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as api:
            while time.monotonic() < self.end:
                try:
                    status, tokens = "200", self._once(api, rng, seed % 2 == 0)
                except openai.APIStatusError as error:
                    status, tokens = str(error.status_code), 0
                    time.sleep(rng.random())
                except openai.APIConnectionError as error:
                    status, tokens = f"none: {type(error.__cause__).__name__}", 0
                with self._lock:
                    self.statuses[status] += 1
                    self.tokens += tokens

    def _once(self, api: Any, rng: random.Random, streams: bool) -> int:
        text = " ".join(rng.choices(WORDS, k=rng.randint(2, 40)))
        temperature = rng.choice([0, rng.random() * 1.5])
        asked = {"model": NAME, "max_tokens": rng.randint(1, 24), "temperature": temperature}
        messages = [{"role": "user", "content": text}]
        if not streams:
            return api.chat.completions.create(messages=messages, **asked).usage.completion_tokens
        leaves_after = rng.choice([2, 1000])
        count = 0
        with api.chat.completions.create(messages=messages, stream=True, **asked) as answer:
            for count, _ in enumerate(answer, 1):
                if count == leaves_after:
                    break
        return count


def load(port: int, process: psutil.Process, clients: int, seconds: float) -> dict[str, Any]:
    """So many clients for so long."""
    group, marks = Clients(port, clients, seconds), []

    def watch() -> None:
        while time.monotonic() < group.end:
            marks.append(process.memory_info().rss)
            time.sleep(seconds / 100)

    watching = threading.Thread(target=watch)
    watching.start()
    group.run()
    watching.join()
    first, last = max(marks[len(marks) // 20 : len(marks) // 10 + 1]), max(marks[-len(marks) // 20 :])
    wrong = {one: n for one, n in group.statuses.items() if one[0] in "5n"}
    growth = last / first - 1
    return {
        "clients": clients, "seconds": seconds, "statuses": dict(group.statuses), "wrong": wrong,
        "tokens": group.tokens, "rss_bytes_first": first, "rss_bytes_last": last, "rss_growth": growth,
        "rss_bytes": marks[:: max(len(marks) // 20, 1)],
        "holds": not wrong and growth < DRIFT and group.statuses["200"] > 0 and is_serving(port),
    }  # fmt: skip


WRONG_VALUES: dict[str, list[Any]] = {
    "temperature": [-1, "hot", [], True, 1e9, 10**30],
    "top_p": [-1, 2, 0, "x", {}],
    "min_p": [-0.5, 1.5, "x"],
    "top_k": [-1, 10**9, 1.5, "x"],
    "max_tokens": [0, -1, 1.5, "x", 10**15, []],
    "repetition_penalty": [-1, 1e9, "x"],
    "presence_penalty": [-9, "x"],
    "logit_bias": [[], {"x": 1}, {"-1": 1}, {"999999999": 1}, {"1": "x"}],
    "logprobs": [5, "x"],
    "top_logprobs": [-7, 99, "x"],
    "seed": ["x", 1.5, []],
    "stop": ["", [1], {}, [""]],
    "stream": ["x", 1],
    "stream_options": ["x", {"include_usage": 3}],
    "n": [0, 2, "x"],
    "model": [1, "other/model", []],
    "messages": ["x", [], [1], [{}], [{"role": "x", "content": "x"}], [{"role": "user", "content": 1}]],
    "tools": ["x", [1], [{"type": "x"}]],
    "unknown": [1],
}


def malformed(rng: random.Random) -> bytes:
    """A request that is wrong in one way."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "fox"}], "max_tokens": 1}
    name = rng.choice(list(WRONG_VALUES))
    wrong = _request(json.dumps({**body, name: rng.choice(WRONG_VALUES[name])}).encode())
    data = json.dumps(body).encode()
    if rng.random() < 0.5:
        return wrong
    cases = (
        _request(data[: rng.randrange(len(data))]),
        _request(rng.randbytes(rng.randrange(1, 300)) + b"\xff"),
        _request(data.replace(b"1}", rng.choice([b"NaN}", b"-Infinity}", b"1e999}", b"1" * 5000 + b"}"]))),
        _request(data.replace(b'"fox"', b"[" * 60 + b"]" * 60)),
        _request(data.replace(b"fox", rb"\ud83d")),
        _request(data, length=rng.choice(["-1", "x", "1e3", "", "1" * 40, "0x10"])),
        _request(data, length=str(rng.randrange(2**21, 2**40))),
        _request(data, more="Transfer-Encoding: chunked\r\n"),
        _request(data, host=f"host{rng.randrange(100)}.example"),
        _request(data, more=f"Origin: https://page{rng.randrange(100)}.example\r\n"),
        _request(data, more="X-Long: " + "x" * 70_000 + "\r\n"),
        _request(data, more="X-Many: x\r\n" * 150),
        _request(data, path=f"/v1/{rng.randrange(1000)}"),
        _request(data, method=rng.choice(["PUT", "DELETE", "PATCH", "BREW"])),
        rng.randbytes(rng.randrange(1, 200)).replace(b"\n", b" ") + b"\r\n\r\n",
        b"GET /health HTTP/3.7\r\nHost: localhost\r\n\r\n",
    )
    return rng.choice(cases)


def _request(
    body: bytes,
    method: str = "POST",
    path: str = "/v1/chat/completions",
    host: str = "localhost",
    length: str | None = None,
    more: str = "",
) -> bytes:
    size = len(body) if length is None else length
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {size}\r\n{more}\r\n"
    return head.encode() + body


def status_of(port: int, data: bytes) -> int:
    """The status that raw bytes get; 0 for none."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        except OSError:  # refused before all was sent
            pass
        found = b""
        try:
            while part := connection.recv(65536):
                found += part
        except ConnectionError:
            pass
    return int(found.split(maxsplit=2)[1]) if found.startswith(b"HTTP/") else 0


def is_serving(port: int) -> bool:
    """Whether it is healthy and answers; busy ones are asked again."""
    import openai

    url = f"http://127.0.0.1:{port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=5) as api:
        found = api.completions.create(model=NAME, prompt="the quick", max_tokens=2)
    health = status_of_health(port)
    return found.usage.completion_tokens > 0 and health == 200


def status_of_health(port: int) -> int:
    """The status of /health."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        return int(connection.recv(100).split(maxsplit=2)[1])


def send_malformed(port: int, process: psutil.Process, count: int, seed: int) -> dict[str, Any]:
    """So many malformed requests, one after the other."""
    statuses: Counter[int] = Counter()
    first = process.memory_info().rss
    start = time.monotonic()
    for at in range(count):
        statuses[status_of(port, malformed(random.Random(f"{seed}-{at}")))] += 1
    wrong = {status: n for status, n in statuses.items() if not 400 <= status < 500}
    return {
        "requests": count, "seed": seed, "seconds": time.monotonic() - start, "statuses": dict(statuses),
        "wrong": wrong, "rss_bytes_first": first, "rss_bytes_last": process.memory_info().rss,
        "holds": not wrong and is_serving(port),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("load", "malformed"))
    parser.add_argument("model", help="a converted folder")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--decode-concurrency", type=int, default=8, help="of the server")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a .json file for the result")
    options = parser.parse_args()
    with serving(options.model, "--decode-concurrency", options.decode_concurrency) as (port, process):
        if options.what == "load":
            found = load(port, process, options.clients, options.seconds)
        else:
            found = send_malformed(port, process, options.requests, options.seed)
    found |= {"decode_concurrency": options.decode_concurrency, "machine": machine.facts()}
    result = json.dumps(found)
    print(result)
    if options.output:
        options.output.write_text(result + "\n")
    return 0 if found["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
