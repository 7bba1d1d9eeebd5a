"""The server as a whole: socket, generating thread, handlers, and how it begins and ends."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from inspect import signature
from typing import Any, NoReturn

from spqt_cli.decode import generate, session
from spqt_cli.decode.options import Prompt
from spqt_cli.decode.parallel import Processes
from spqt_cli.errors import BackendError, BusyError, ResourceError, SpqtError, UsageError
from spqt_cli.serve import handler
from spqt_cli.serve.admission import Admission
from spqt_cli.serve.fields import Served
from spqt_cli.serve.generator import ENDS, Generator, PromptCache, Provider
from spqt_cli.serve.guard import Guard, is_loopback
from spqt_cli.serve.metrics import WINDOW_SECONDS, Metrics, line
from spqt_cli.version import __version__

WARM_UP_PROMPT = "Write a story."
END_SECONDS = 2.0  # for a step under way and the last answers, once the end was asked for
# Of mlx_lm.server's own options, those that are not offered.
UNUSED = {
    "chat_template": "",
    "kv_bits": None,
    "kv_group_size": 64,
    "quantized_kv_start": 0,
}
SPARSITY = "Sparsity that thresholds aim at, 0 to 1."
SKIPPED = "Share of the Zigzag weights skipped, 0 to 1, mean of all tokens of answers that have ended."
RATE = (
    f"Tokens decoded per second of decoding, all requests, over its last {WINDOW_SECONDS:.0f} seconds; "
    "prompts and idle time do not count."
)
LATE_REQUEST = b"HTTP/1.0 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"


@dataclass(frozen=True)
class Limits:
    """What one server takes. waiting: requests in the queue; connections: open at a time; body_bytes: of one
    request; read_seconds: for a whole request to come in.
    """

    waiting: int = 64
    connections: int = 256
    body_bytes: int = 1 << 20
    read_seconds: float = 20.0


class Server(ThreadingHTTPServer):
    """Connections, a thread each. When all are taken the one that has been silent longest gives way."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, host: str, port: int, guard: Guard, limits: Limits) -> None:
        """Listen. Raises UsageError for a host that is none, BusyError for a port that is taken."""
        self.guard, self.limits = guard, limits
        self.metrics, self.created = Metrics(), int(time.time())
        self.reading: dict[socket.socket, float] = {}  # whose request has not come in, and since when
        self._held: set[socket.socket] = set()
        self.generator: Any = None
        self._free = threading.BoundedSemaphore(limits.connections)
        family, address = _address(host, port)
        self.address_family = family
        try:
            super().__init__(address, BaseHTTPRequestHandler)  # until open_to names ours
        except PermissionError:
            raise ResourceError(f"port {port} is not allowed", "use one from 1024 on: --port") from None
        except OSError as error:
            raise BusyError(
                f"can't listen on {host}:{port}: {error.strerror}", "use another --port"
            ) from None

    def server_bind(self) -> None:
        """Without the base's look-up of the host's name, which may take long."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def open_to(self, generator: Generator, served: Served, concurrency: int, fingerprint: str) -> None:
        """Take requests from now on; until the generator is ready they are answered with 503."""
        self.generator, self.served = generator, served
        self.admission = Admission(concurrency, self.limits.waiting)
        self.RequestHandlerClass = handler.factory(generator, fingerprint)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self._hang_up_on_the_oldest()
            if not self._free.acquire(timeout=0.2):
                self.metrics.request("other", 429)
                with contextlib.suppress(OSError):
                    request.setblocking(False)
                    request.send(LATE_REQUEST)
                self.shutdown_request(request)
                return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread can be started
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        self._held.add(request)
        self.reading[request] = time.monotonic()
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._held.discard(request)
            self.reading.pop(request, None)
            self._free.release()

    def is_answering(self) -> bool:
        """Whether a request has come in whose answer is not written."""
        return any(one not in self.reading for one in self._held.copy())

    def _hang_up_on_the_oldest(self) -> None:
        """Of the connections whose request has not come in: a handler takes its own out once it has."""
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # it ends by itself meanwhile
            oldest = min(list(self.reading.items()), key=lambda one: one[1])[0]
            oldest.shutdown(socket.SHUT_RDWR)

    def unhealthy(self) -> str:
        """Why requests are not served now."""
        if self.generator.is_ending:
            return ENDS
        available = self.generator.generation_available()
        return "the model is loading" if available else "the generator has ended"

    def metrics_text(self) -> str:
        """The counts, as Prometheus reads them."""
        metrics, loaded = self.metrics, self.generator.model_provider.loaded
        statistics = self.generator.statistics
        about = {"version": __version__, "model": self.served.name}
        if statistics:
            about["backend"] = statistics.backend
        rows = (
            ("info", "gauge", "What runs.", [(about, 1.0)]),
            ("healthy", "gauge", "1 where requests are served.", float(self.generator.is_healthy)),
            (
                "sparsity",
                "gauge",
                "Sparsity that thresholds aim at, 0 to 1.",
                (loaded and loaded.sparsity) or 0.0,
            ),
            ("skipped_share", "gauge", SKIPPED, metrics.skipped_share),
            ("tokens_per_second", "gauge", RATE, metrics.tokens_per_second()),
            ("generated_tokens_total", "counter", "Tokens generated.", float(metrics.tokens)),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", float(metrics.prompt_tokens)),
            ("requests_total", "counter", "Requests by path and status.", metrics.requests()),
            ("requests_running", "gauge", "Requests that have their turn.", float(self.admission.running)),
            ("requests_waiting", "gauge", "Requests in the queue.", float(self.admission.waiting)),
        )
        return "".join(line(*row) for row in rows)


class Service:
    """A server and its generator. open_model is called in the generating thread.

    server: None in all but the first of several `processes`. arguments: mlx-lm's own, by its names
    (mlx_lm.server), of which decode_concurrency is how many requests run at a time. ending: set where the
    end is asked for.
    """

    def __init__(
        self,
        server: Server | None,
        open_model: Callable[[], session.Loaded],
        arguments: Namespace,
        served: Served,
        processes: Processes | None = None,
        ending: threading.Event | None = None,
    ) -> None:
        self.server, self.served, self.ending = server, served, ending or threading.Event()
        most = arguments.prompt_cache_bytes
        # With drafts mlx-lm keeps caches that hold other tokens than it says: a repeated request was answered
        # otherwise than the first.
        count = 0 if arguments.draft_model else arguments.prompt_cache_size
        cache = PromptCache(count, 1 << 63 if most is None else most)
        metrics = Metrics() if server is None else server.metrics
        self.generator = Generator(Provider(arguments, open_model), cache, metrics, processes)
        if server is not None:
            server.open_to(self.generator, served, arguments.decode_concurrency, f"spqt-{__version__}")

    def get_ready(self) -> bool:
        """Wait for the model and a first generation; False if the end was asked for. Raises SpqtError."""
        if not self._wait(self.generator.has_loaded):
            return False
        # Here and not in the thread: a template's time is limited in the main thread alone.
        self.generator.begin(
            generate.encode(self.generator.model_provider.loaded, Prompt(text=WARM_UP_PROMPT))
        )
        return self._wait(self.generator.is_ready)

    def run(self) -> None:
        """Serve until the end is asked for. Raises SpqtError when the generating thread ends by itself."""
        self._wait(threading.Event())

    def _wait(self, event: threading.Event) -> bool:
        while not event.wait(0.1):
            if self.ending.is_set():
                return False
            if not self.generator.generation_available():
                if self.server is None and self.generator.error is None:  # the first process told it to end
                    return False
                raise _cause(self.generator.error)
        return not self.ending.is_set()

    def close(self) -> None:
        """End the step under way, give the last answers, stop listening."""
        self.generator._stop = True
        end = time.monotonic() + END_SECONDS
        self.generator._generation_thread.join(END_SECONDS)
        if self.server is None:
            return
        while self.server.is_answering() and time.monotonic() < end:
            time.sleep(0.01)
        self.server.shutdown()
        self.server.server_close()

    def start_line(self) -> str:
        """What runs, for people; "" in a process without a server."""
        if self.server is None:
            return ""
        loaded, found = self.generator.model_provider.loaded, self.generator.statistics
        host, port = self.server.server_address[:2]
        where = f"[{host!s}]:{port}" if ":" in str(host) else f"{host!s}:{port}"
        sparsity = f"{loaded.sparsity:.0%} sparsity" if loaded.sparsity else "dense"
        if found.processes > 1:
            sparsity += f", {found.parallel} parallel in {found.processes} processes"
        return (
            f"spqt: serving {self.served.name} on http://{where} | backend {found.backend} "
            f"({found.backend_reason}) | {sparsity}, skipped {found.sparsity:.1%} of the Zigzag weights | "
            f"{found.generation_tps:.1f} tok/s over {found.generation_tokens} tokens of a first answer"
        )


def serve(opened: Callable[[threading.Event], Service], said: Callable[[str], None]) -> None:
    """Run a service in the main thread until SIGTERM or SIGINT, which end the process with 0.

    opened: makes the service, given what says that the end is asked for: a signal may come as soon as it
    listens.
    said: is given notes, the start line and the last one, which begins anew after a terminal's ^C. Raises
    SpqtError where it can't begin or breaks down.
    """
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    service = opened(ending)
    with _as_line(service):
        if service.get_ready():
            loaded = service.generator.model_provider.loaded
            for text in filter(None, (loaded.note and f"note: {loaded.note}", loaded.warning)):
                said(text)
            said(service.start_line())
            service.run()
        service.close()
    with contextlib.suppress(OSError, RuntimeError):
        said("\nspqt: the server has ended" if sys.stderr.isatty() else "spqt: the server has ended")
    _leave(0)


@contextlib.contextmanager
def _as_line(service: Service) -> Iterator[None]:
    """After an error is told by its caller the process ends at once: an orderly end was seen to abort."""
    import atexit

    try:
        yield
    except SpqtError as error:
        service.close()
        atexit.register(_leave, error.exit_code)
        raise


def _leave(code: int) -> NoReturn:
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: the signal struck amid a flush
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _cause(error: BaseException | None) -> SpqtError:
    if isinstance(error, SpqtError):
        return error
    if isinstance(error, MemoryError):
        return ResourceError("out of memory", "use a smaller model, or fewer --decode-concurrency")
    return BackendError(
        f"the generating thread ended: {type(error).__name__}: {error}"[:500],
        "start it again; please report what --log-level ERROR prints",
    )


def served(name: str, given: str, vocabulary: int | None) -> Served:
    """What requests are checked against. given: the model as the command line has it."""
    from transformers import PreTrainedTokenizerBase

    reserved = frozenset(signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    return Served(
        name, frozenset({given} - {name}), vocabulary, reserved | {"messages", "add_generation_prompt"}
    )


def needs_key(host: str) -> bool:
    """Whether others than this machine can connect there."""
    return not is_loopback(str(_address(host, 0)[1][0]))


def _address(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host!r} is no address: {error}", "127.0.0.1 is the default") from None
    return found[0][0], found[0][4]
