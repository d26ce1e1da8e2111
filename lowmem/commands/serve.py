"""`lowmem serve MODEL`: an OpenAI-compatible API and a chat page, on the same session as the terminal."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.chat.loading import loading
from lowmem.commands.answering import INTERRUPTED, note, read_text
from lowmem.commands.plan_options import add_check_argument, add_plan_arguments, request_of
from lowmem.errors import InvalidRequestError
from lowmem.loading.garbage import paused_collection

if TYPE_CHECKING:
    from lowmem.plan.request import Request
    from lowmem.server.worker import Worker
    from lowmem.session import Session

KEYS = "LOWMEM_API_KEY"
_SHORTEST_KEY = 8
OWN_BYTES = 256 << 20
"""Of the host's memory, beside the model's plan: for requests, and answers that wait for their readers."""
_OFF = ("0", "none", "off")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowmem serve`."""
    add_plan_arguments(parser)
    add_check_argument(parser)
    listen = parser.add_argument_group("where it listens, and who may use it")
    listen.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="to listen at (%(default)s: this machine alone)",
    )
    listen.add_argument(
        "--port", type=_port, default=8000, metavar="N", help="0 takes any that is free (%(default)s)"
    )
    listen.add_argument(
        "--api-key-file", metavar="FILE", help=f"keys that requests need, one a line; or in ${KEYS}"
    )
    listen.add_argument("--api-key", metavar="KEY", help=argparse.SUPPRESS)
    listen.add_argument(
        "--no-api-key", action="store_true", help="let everybody who reaches the address use the model"
    )
    listen.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which browsers and editors may call this server; may be repeated",
    )
    listen.add_argument(
        "--served-name",
        action="append",
        default=[],
        metavar="NAME",
        help="the `model` of requests; may be repeated (MODEL's last part)",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--queue",
        type=_count,
        default=32,
        metavar="N",
        help="requests that may wait; more get 429 (%(default)s)",
    )
    limits.add_argument(
        "--time-limit",
        type=_seconds,
        default=600.0,
        metavar="SECONDS",
        help="from a request's arrival to its end (%(default)g)",
    )
    limits.add_argument(
        "--prefix-cache",
        default="128MiB",
        metavar="SIZE",
        help="of the host's memory, for the beginnings of earlier prompts; 0 is none (%(default)s)",
    )
    limits.add_argument("--max-body", default="2MiB", metavar="SIZE", help="of a request (%(default)s)")
    limits.add_argument(
        "--shutdown-seconds",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="for the answer that is being written when the server is to end (%(default)g)",
    )
    parser.add_argument("--no-speculation", action="store_true", help="compute every token by itself")
    parser.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")


@dataclass(frozen=True)
class Door:
    """Who may come in. keys: any of them opens; none: all may. hosts: names beside the loopback's."""

    keys: tuple[str, ...]
    hosts: tuple[str, ...]


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends it; the exit code. Raises LowmemError for what the user can mend."""
    from lowmem.plan.device import parse_bytes

    door = check_door(args)
    max_body = parse_bytes(args.max_body, "--max-body")
    prefixes = 0 if args.prefix_cache in _OFF else parse_bytes(args.prefix_cache, "--prefix-cache")
    request = request_of(args)
    from lowmem.server.running import Server, bind, url_of

    say = _silent if args.quiet else note
    with bind(args.host, args.port) as listener:
        url = url_of(listener)
        # Only now: FastAPI and torch take seconds to import, and what is wrong above needs neither.
        from lowmem.server.app import make_app
        from lowmem.server.guard import GuardSettings, explain
        from lowmem.server.worker import Worker

        with loading(args.model, quiet=args.quiet) as progress:
            worker = Worker(
                lambda: _open(request, prefixes, not args.no_speculation, say, progress),
                queue_limit=args.queue,
                report=lambda error: note(explain(error, "the model's thread")),
            )
            session = _started(worker, quiet=args.quiet)
        names = tuple(args.served_name) or (served_name(args.model),)
        app = make_app(
            worker,
            names,
            guard=GuardSettings(door.hosts, door.keys, max_body),
            time_limit=args.time_limit,
            log=say,
        )

        def listening() -> None:
            from lowmem.chat.figures import describe

            if not args.quiet:
                note(describe(session.loaded, session.context))
            print(f"{names[0]} is served at {url} (API: {url}/v1)", flush=True)

        server = Server(app, worker, shutdown_seconds=args.shutdown_seconds, listening=listening, notify=say)
        server.run([listener])
    if not worker.join(5):
        _leave(0)  # its forward takes longer than anybody waits
    return 0


def check_door(args: argparse.Namespace) -> Door:
    """Who may use the server. Raises InvalidRequestError where that is everybody and nobody said so."""
    from lowmem.server.addresses import host_name, is_loopback

    if args.api_key is not None:
        raise InvalidRequestError(
            "a key on the command line can be read by everybody on this machine",
            f"Put it into a file for --api-key-file, or into ${KEYS}",
        )
    keys = read_keys(args.api_key_file)
    if keys and args.no_api_key:
        raise InvalidRequestError(
            "there are keys, and --no-api-key", f"Leave --no-api-key out, or --api-key-file and ${KEYS}"
        )
    if not keys and not args.no_api_key and not is_loopback(args.host):
        raise InvalidRequestError(
            f"{args.host} can be reached from other machines, and there is no API key",
            f"Give one with --api-key-file or ${KEYS}, or say --no-api-key to let everybody use the model",
        )
    for name in args.allow_host:
        if host_name(name) != name.lower():
            raise InvalidRequestError(
                f"--allow-host {name!r} is not the name of a host", "Give it without http:// and port"
            )
    return Door(keys, tuple(args.allow_host))


def read_keys(path: str | None) -> tuple[str, ...]:
    """The keys of a file, one a line, or else of the environment, separated by blanks or commas.

    Raises InvalidRequestError for one that is too short, or a file without any.
    """
    if path is not None:
        keys = read_text(path, "Give a file with one key a line").split()
        if not keys:
            raise InvalidRequestError(
                f"{path} holds no key", "Write one into it, as `openssl rand -hex 16` does"
            )
    else:
        keys = os.environ.get(KEYS, "").replace(",", " ").split()
    for key in keys:
        if len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable():
            raise InvalidRequestError(
                f"an API key is shorter than {_SHORTEST_KEY} characters, or not plain ASCII",
                "Make one with `openssl rand -hex 16`",
            )
    return tuple(dict.fromkeys(keys))


def served_name(model: str) -> str:
    """What requests call a model: a hub id or a name from the cache as it is, of a path the last part."""
    path = Path(model).expanduser()
    if not path.exists():
        return model
    name = path.resolve()
    return name.stem if name.is_file() else name.name


def _open(request: Request, prefixes: int, speculate: bool, say: Any, progress: Any) -> Session:
    """In the model's thread: the model, loaded, with `prefixes` bytes for those of earlier prompts."""
    with paused_collection():
        from lowmem.generate.prefix_store import PrefixStore
        from lowmem.loading.opening import open_model
        from lowmem.plan.device import host_memory_available, host_memory_private
        from lowmem.session import Session

    ram = request.ram or host_memory_available() + host_memory_private()
    loaded = open_model(replace(request, ram=max(1, ram - OWN_BYTES - prefixes)), say, progress)
    session = Session(loaded, speculate=speculate)
    if prefixes:
        session.engine.store = PrefixStore(prefixes)
    return session


def _started(worker: Worker, *, quiet: bool) -> Session:
    try:
        return worker.start()
    except KeyboardInterrupt:
        if not quiet:
            note("interrupted")
        _leave(INTERRUPTED)
        raise


def _leave(code: int) -> None:
    """End at once: a thread that is deep in a forward, or in a load, is not waited for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number < 1 << 16:
        raise argparse.ArgumentTypeError(f"{number} is not a port: use 1 to 65535, or 0 for any that is free")
    return number


def _count(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 10_000:
        raise argparse.ArgumentTypeError(f"{number} is not 1 to 10000")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return number


def _silent(line: str) -> None:
    """Says nothing."""
