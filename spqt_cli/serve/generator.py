"""mlx-lm's ResponseGenerator with our loader: one thread generates for all requests, one step at a time.

What can fail in a request (template, tokenizer, context) is done beforehand, in the thread of the
request; what reaches the generating thread can only be generated. If that thread ends all the same, `error`
has the reason and nothing is healthy any more.
"""

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from mlx_lm import server
from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from spqt_cli.backends import select
from spqt_cli.decode import active_counts, context, foreign, generate, session, text_borders
from spqt_cli.decode.options import Options, Sampling
from spqt_cli.decode.parallel import Processes
from spqt_cli.errors import BackendError, SpqtError
from spqt_cli.serve import sharing
from spqt_cli.serve.connection import Client
from spqt_cli.serve.metrics import Metrics
from spqt_cli.serve.refusal import ClientGone, Refusal
from spqt_cli.serve.sampling import make_sampler

COUNT_SECONDS = 1.0  # between readings of what was skipped: a reading waits for the device
WARM_UP_TOKENS = 16

_log = logging.getLogger("spqt")


class Provider(server.ModelProvider):
    """mlx-lm's source of models, which here has one: loaded by us, once, and no other."""

    model: Any
    model_key: Any
    draft_model: Any

    def __init__(self, arguments: Any, open_model: Callable[[], session.Loaded]) -> None:
        super().__init__(arguments)
        self._open = open_model
        self.loaded: session.Loaded | None = None

    def load(self, *_: Any) -> tuple[Any, Any]:
        """The model and its tokenizer, whatever is asked for; loaded in the thread that first asks."""
        if self.loaded is None:
            loaded = self._open()
            self.model, self.tokenizer, self.model_key = loaded.model, loaded.tokenizer, (str(loaded.folder),)
            self.draft_model = loaded.draft.model if loaded.draft else None
            merges = all(hasattr(one, "merge") for one in make_prompt_cache(loaded.model))
            self.is_batchable = merges and self.draft_model is None
            self.loaded = loaded
        return self.model, self.tokenizer

    load_default = load


class PromptCache(LRUPromptCache):
    """mlx-lm's prompt cache, which always leaves a token to be fed."""

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if rest:
            return cache, rest
        if not can_trim_prompt_cache(cache):
            return None, tokens
        trim_prompt_cache(cache, 1)
        return cache, tokens[-1:]


ENDS = "the server ends"  # what requests under way are told then


class Responses(queue.Queue[Any]):
    """What the generating thread says to one request.

    alone: nothing else runs, so that a request that is not wanted any more ends by an exception of `put`,
    which mlx-lm catches there. at_end: called once all is said, which a slow client may hear much later.
    on_step: called for each token but the first, which the prompt gave, with when the last one and when it
    came (time.monotonic).
    """

    def __init__(
        self,
        unwanted: Callable[[], bool],
        at_end: Callable[[], None],
        on_step: Callable[[float, float], None] = lambda *_: None,
    ) -> None:
        super().__init__()
        self._unwanted, self._at_end, self._on_step = unwanted, at_end, on_step
        self._came: float | None = None
        self.alone = False

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        if self.alone and isinstance(item, (tuple, server.Response)) and self._unwanted():
            raise ClientGone
        if isinstance(item, server.Response):
            before, self._came = self._came, time.monotonic()
            if before is not None:
                self._on_step(before, self._came)
        super().put(item, block, timeout)
        if item is None or isinstance(item, Exception):
            self._at_end()


class Generator(server.ResponseGenerator):
    """See the module. The thread starts with the object; `begin` lets it warm up once it has loaded.

    processes: those that generate together; the first one gets the requests and tells the others.
    """

    model_provider: Any  # a Provider
    _time_budget: Any

    def __init__(
        self, provider: Provider, cache: PromptCache, metrics: Metrics, processes: Processes | None = None
    ) -> None:
        self.metrics, self.processes = metrics, processes
        self._client: Any = None  # of the request whose sampler is made next
        self.error: BaseException | None = None
        self.statistics: Any = None  # of the warm-up
        self.has_loaded, self.is_ready = threading.Event(), threading.Event()
        self._first: queue.Queue[list[int]] = queue.Queue()
        self._preparing = threading.Lock()
        self._counting = contextlib.ExitStack()
        self._counter: active_counts.Counter | None = None
        self._counted_at, self._counted = time.monotonic(), 0
        super().__init__(provider, cache)
        self._time_budget = (None,)  # after each step: who has left, who has come, whether to end

    @property
    def is_ending(self) -> bool:
        """Whether the end was asked for."""
        return bool(self._stop)

    @property
    def is_healthy(self) -> bool:
        """Whether a request would be served now."""
        return self.is_ready.is_set() and self.generation_available() and not self._stop

    def begin(self, tokens: list[int]) -> None:
        """Warm up on a prompt, then serve."""
        self._first.put(tokens)

    def _run_generate(self) -> None:
        try:
            with foreign.replaced([(server, "_make_sampler", self._make_sampler)]):
                self._generate()
        except BaseException as error:
            self.error, self._generation_failed = error, True
            if not isinstance(error, SpqtError):
                _log.exception("the generating thread ended")
        finally:
            self._counting.close()

    def _generate(self) -> None:
        _, tokenizer = self.model_provider.load_default()
        if tokenizer._chat_template is None:  # transformers renders it: what messages say stays text
            self.cli_args.chat_template_args["sanitize_control_tokens"] = True
        self.has_loaded.set()
        while not self._stop:
            with contextlib.suppress(queue.Empty):
                self._warm_up(self._first.get(timeout=0.1))
                break
        super()._generate()
        if self.processes is not None and self.processes.rank == 0:
            self._share_object(sharing.END)

    def _make_sampler(self, args: Any, tokenizer: Any) -> Any:
        sampler, processes, client = make_sampler(args, tokenizer), self.processes, self._client
        if processes is None:
            return sampler
        end = min(tokenizer.eos_token_ids)
        return sharing.agreeing(sampler, processes, end, lambda: client.left or self._stop)

    def _share_request(self, request: Any) -> Any:
        """As mlx-lm's, of a request and what belongs to it; in other processes its responses go nowhere."""
        if self.processes is None:
            return request
        found = self._share_object(request and (sharing.bare(request[1]), request[2]))
        if found == sharing.END:
            self._stop = True
            return None
        if found is None or self.processes.rank == 0:
            return request
        return (Responses(lambda: False, lambda: None), *found)

    def _warm_up(self, tokens: list[int]) -> None:
        *_, self.statistics = generate.stream(
            self.model_provider.loaded, tokens, Sampling(), Options(max_tokens=WARM_UP_TOKENS)
        )
        self._count_anew()
        self.is_ready.set()

    def _count_anew(self) -> None:
        self._counting.close()
        self._counter = self._counting.enter_context(active_counts.counting(select.backend().count_every))
        self._counted_at, self._counted = time.monotonic(), self.metrics.tokens

    def _next_request(self, timeout: float | None = None) -> Any:
        """As mlx-lm's; asked for between any two steps, so that counts are read here now and then."""
        tokens = self.metrics.tokens - self._counted
        if tokens and self._counter and time.monotonic() - self._counted_at > COUNT_SECONDS:
            shares = self._counter.shares()
            if shares:
                self.metrics.skipped(session.touched_bytes(self.model_provider.loaded, shares)[2], tokens)
            self._count_anew()
        return super()._next_request(timeout)

    def _prepare(self, request: Any, arguments: Any) -> Any:
        """What mlx-lm's `_tokenize` gives for a request, which is sound then. Raises Refusal, SpqtError."""
        loaded = self.model_provider.loaded
        if request.tools and not loaded.tokenizer.has_tool_calling:
            raise Refusal(400, "the model's chat template takes no tools", "tools")
        with self._preparing:
            try:
                found = super()._tokenize(loaded.tokenizer, request, arguments)
                self._make_state_machine(
                    self.model_provider.model_key, loaded.tokenizer, arguments.stop_words
                )
            except (SpqtError, MemoryError):
                raise
            except Exception as error:  # a template is the model's code: it may raise anything
                raise Refusal(400, f"the chat template does not take this: {error}"[:500]) from error
        tokens = session.known(loaded, list(found[0]))
        if not tokens:
            raise Refusal(400, "nothing is left of the prompt")
        if (limit := context.tokens(loaded.config)) is not None:
            arguments.max_tokens = context.room(limit, len(tokens), arguments.max_tokens)
        return found

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        """Called by mlx-lm in the generating thread."""
        if request.client.left and self.processes is None:
            raise ClientGone
        self._client = request.client
        return request.prepared

    def _is_batchable(self, args: Any) -> bool:
        """As mlx-lm's, unless a batch could only be of one request, which runs by itself at least as fast."""
        return self.cli_args.decode_concurrency > 1 and super()._is_batchable(args)

    def _serve_single(self, request: Any, stream: Any) -> None:
        request[0].alone = self.processes is None
        super()._serve_single(request, stream)

    def generate(self, request: Any, generation_args: Any, progress_callback: Any = None) -> tuple[Any, Any]:
        """The context of a request and an iterator of its Responses; called in the request's thread.

        request.client: who is looked after; request.is_generated: called at the end. Raises Refusal,
        SpqtError, ClientGone.
        """
        stops, generation_args.stop_words = generation_args.stop_words, []
        request.prepared = self._prepare(request, generation_args)
        self.metrics.prompt(len(request.prepared[0]))
        client: Client = request.client
        responses = Responses(lambda: client.left or self._stop, request.is_generated, self.metrics.step)
        self.requests.put((responses, request, generation_args))
        found = self._take(responses, client)
        text = _Text(self.model_provider.tokenizer, found.prompt, stops)
        return found, self._each(responses, client, progress_callback, text)

    def _take(self, responses: Responses, client: Client) -> Any:
        while True:
            try:
                found = responses.get(timeout=0.25)
            except queue.Empty:
                found = None
                if not self.generation_available():
                    raise Refusal(503, ENDS, code="unavailable") from None
                client.check()
                continue
            if isinstance(found, ClientGone) and self.is_ending and not client.left:
                raise Refusal(503, ENDS, code="unavailable")
            if isinstance(found, Exception):
                raise found
            return found

    def _each(self, responses: Responses, client: Client, progress: Any, text: "_Text") -> Iterator[Any]:
        while (found := self._take(responses, client)) is not None:
            client.check()
            if isinstance(found, tuple):
                progress(*found)
                continue
            self.metrics.token()
            if not math.isfinite(found.logprob):
                raise BackendError(
                    "the model's output is not finite (NaN or infinity)",
                    "check its files: `spqt verify MODEL`",
                )
            found.text, is_over = text.push(found)
            if is_over:  # mlx-lm would drop a text that comes with "stop", and takes an end for one
                found.finish_reason = None
            yield found
            if is_over:
                return


class _Text:
    """The text of an answer as `spqt generate` has it: its first space, whole characters, stop strings.

    mlx-lm's server is given no stop strings: it ends at one only where the tokens are those that the string
    alone would have.
    """

    def __init__(self, tokenizer: Any, prompt: list[int], stops: list[str]) -> None:
        self._ends = tokenizer.eos_token_ids
        self._answer = text_borders.Answer(tokenizer, prompt)
        self._gate = generate.StopStrings(stops)

    def push(self, response: Any) -> tuple[str, bool]:
        """(the text that a step adds, whether the answer ends here by a stop)."""
        reason = response.finish_reason
        text = "" if reason == "stop" and response.token in self._ends else self._answer.push(response.token)
        text, is_met = self._gate.push(text + (self._answer.flush() if reason else ""))
        if reason and not is_met:
            text += self._gate.flush()
        return text, is_met or reason == "stop"
