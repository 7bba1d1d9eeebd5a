"""`spqt serve`: its flags. Names and meanings are mlx_lm.server's where it has them."""

import contextlib
import threading
from argparse import Namespace
from pathlib import Path
from typing import Annotated

import typer

from spqt_cli.cli import flags
from spqt_cli.cli.flags import Adapter, ModelArgument, ModelOption, Revision, Trust
from spqt_cli.errors import SpqtError, UsageError

USAGE = "spqt serve MODEL"
KEY_VARIABLE = "SPQT_API_KEY"


def serve(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")] = 8080,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help=f"File with the key that clients send; or {KEY_VARIABLE}.", readable=False),
    ] = None,
    allowed_hosts: Annotated[
        str, typer.Option(help="Names this server goes by, with commas; loopback's always count.")
    ] = "",
    allowed_origins: Annotated[
        str, typer.Option(help="Web pages that may ask (https://...), with commas; *: all.")
    ] = "",
    served_model_name: Annotated[
        str | None, typer.Option(help="Name in requests and answers. [its folder's name]")
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Skip nothing, exact zeros included.")] = False,
    sparsity: Annotated[
        float | None, typer.Option(help="Sparsity instead of the calibrated one, 0 to 0.95.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of an answer whose request does not say.")
    ] = 512,
    temp: Annotated[float, typer.Option(help="Temperature where a request has none; 0: likeliest.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling, likewise.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest, likewise; 0: from all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Least probability, likewise.")] = 0.0,
    chat_template_args: Annotated[str, typer.Option(help="JSON object for the chat template.")] = "{}",
    decode_concurrency: Annotated[int, typer.Option(min=1, max=64, help="Requests decoded together.")] = 1,
    prompt_concurrency: Annotated[int, typer.Option(min=1, max=256, help="Prompts run at a time.")] = 8,
    prefill_step_size: Annotated[int, typer.Option(min=1, help="Prompt tokens run at a time.")] = 2048,
    prompt_cache_size: Annotated[int, typer.Option(min=0, help="Key-value caches kept of prompts.")] = 10,
    prompt_cache_bytes: Annotated[int | None, typer.Option(min=0, help="Most bytes of those caches.")] = None,
    adapter_path: Adapter = None,
    draft_model: Annotated[
        str | None, typer.Option(help="A smaller model that proposes tokens; one request at a time.")
    ] = None,
    num_draft_tokens: Annotated[int, typer.Option(min=1, max=16, help="Tokens that it proposes.")] = 3,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Requests that wait while others run; more get 429.")
    ] = 64,
    max_connections: Annotated[
        int, typer.Option(min=1, max=10_000, help="Connections open at a time.")
    ] = 256,
    max_body_bytes: Annotated[
        int, typer.Option(min=1, max=1 << 30, help="Largest request; larger ones get 413.")
    ] = 1 << 20,
    read_timeout: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds in which a request must come in, else 408.")
    ] = 20.0,
    log_level: Annotated[
        str,
        typer.Option(
            help="DEBUG, INFO (each request), WARNING or ERROR.",
            autocompletion=flags.values("DEBUG", "INFO", "WARNING", "ERROR"),
        ),
    ] = "WARNING",
    pipeline: flags.Pipeline = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's API, decoding sparsely."""
    given = locals()  # by the names that mlx_lm.server and decode/options.py have
    path = flags.needed(model, model_option, USAGE)
    if dense and sparsity is not None:
        raise UsageError("--dense and --sparsity exclude one another", "give one of them")
    given["chat_template_args"] = _json_object(chat_template_args)
    _log(log_level)
    key = _key(api_key_file)
    from spqt_cli.decode import parallel, session
    from spqt_cli.decode.options import Cache, Loading, Sampling, check, picked
    from spqt_cli.format import locate
    from spqt_cli.serve import server
    from spqt_cli.serve.guard import Guard

    if server.needs_key(host) and not key:
        raise UsageError(
            f"--host {host} can be reached from other machines, so an API key is needed",
            f"set {KEY_VARIABLE}, or --api-key-file; make one: openssl rand -hex 32",
        )
    sampling = picked(Sampling, given)
    processes = parallel.join(pipeline=pipeline)
    with processes.together() if processes is not None else contextlib.nullcontext():
        folder = locate.open_folder(path, revision, trust_remote_code=trust_remote_code)
    check(sampling, Cache(), folder.config)
    limits = server.Limits(max_waiting, max_connections, max_body_bytes, read_timeout)
    guard = Guard(frozenset({host.lower(), *_names(allowed_hosts)}), frozenset(_names(allowed_origins)), key)

    def opened(ending: threading.Event) -> "server.Service":
        return server.Service(
            server.Server(host, port, guard, limits) if processes is None or processes.rank == 0 else None,
            lambda: session.load(folder, **picked(Loading, {**given, "revision": None})),
            Namespace(**given | server.UNUSED),
            server.served(served_model_name or _name(path), path, folder.size("vocab_size")),
            processes,
            ending,
        )

    server.serve(opened, lambda text: typer.echo(text, err=True))


def _json_object(text: str) -> dict[str, object]:
    import json

    try:
        found = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--chat-template-args is no JSON: {error}", '{"name": true}') from None
    if not isinstance(found, dict):
        raise UsageError("--chat-template-args is no JSON object", '{"name": true}')
    return found


def _log(level: str) -> None:
    import logging

    if level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise UsageError(f"--log-level {level} is none", "DEBUG, INFO, WARNING or ERROR")
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(message)s")


def _key(file: Path | None) -> str:
    """The API key of a file or of the environment; "" without one."""
    import os

    from spqt_cli.serve.guard import checked_key
    from spqt_cli.system import files

    found = os.environ.get(KEY_VARIABLE, "")
    if file is not None:
        try:
            found = files.read_bounded(file).decode("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SpqtError(f"{file} can't be read: {error}", "give a text file with the key") from None
        return checked_key(found)
    return checked_key(found) if found else ""


def _names(text: str) -> list[str]:
    return [one.strip().lower().rstrip("/") for one in text.split(",") if one.strip()]


def _name(path: str) -> str:
    """A hub id as it is; of a path its last part, which tells nobody where it lies."""
    from spqt_cli.format import locate

    return (
        path if locate.is_hub_id(path) and not Path(path).is_dir() else Path(path).expanduser().resolve().name
    )
