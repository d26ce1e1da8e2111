"""`lowmem serve MODEL`: an OpenAI-compatible API and a chat page."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lowmem.chat.loading import Loading
from lowmem.checkpoint.files.home import typed_path
from lowmem.commands.answering import INTERRUPTED, load_session, note, notifier, read_text
from lowmem.commands.plan_options import add_check_argument, add_plan_arguments, request_of
from lowmem.errors import InvalidRequestError
from lowmem.plan.planner import PARALLEL
from lowmem.text.units import format_bytes

if TYPE_CHECKING:
    from lowmem.plan.planner import Plan
    from lowmem.server.worker import Worker
    from lowmem.session import Session

KEYS = "LOWMEM_API_KEY"
_SHORTEST_KEY = 8
OWN_BYTES = 256 << 20
"""Host memory set aside for requests and unread answers, beside the model's plan."""
_OFF = ("0", "none", "off")
ENGINES = ("lowmem", "vllm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lowmem serve`."""
    add_plan_arguments(parser)
    add_check_argument(parser)
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="what computes the answers; vllm: an installed vLLM, for several cards or many users, whose "
        "command is written, shown and watched (default: %(default)s)",
    )
    engine.add_argument(
        "--tensor-parallel",
        type=_count,
        default=1,
        metavar="N",
        help="cards that share the model, or processes on a CPU, with --engine vllm (default: %(default)s)",
    )
    listen = parser.add_argument_group("address and access")
    listen.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default: %(default)s, reachable from this machine only)",
    )
    listen.add_argument(
        "--port", type=_port, default=8000, metavar="N", help="0 takes any free port (default: %(default)s)"
    )
    listen.add_argument(
        "--api-key-file", metavar="FILE", help=f"API keys that requests need, one per line; or set ${KEYS}"
    )
    listen.add_argument("--api-key", metavar="KEY", help=argparse.SUPPRESS)
    listen.add_argument("--no-api-key", action="store_true", help="admit everybody who can reach the address")
    listen.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further host name of this server, for browsers and editors; may be repeated",
    )
    listen.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="an origin whose pages may use the server, such as http://localhost:3000 or, for extensions, "
        "vscode-webview://*; '*' allows every web page; may be repeated",
    )
    listen.add_argument(
        "--served-name",
        action="append",
        default=[],
        metavar="NAME",
        help="the model name in requests; may be repeated (default: the last part of MODEL)",
    )
    listen.add_argument(
        "--ignore-field",
        action="append",
        default=[],
        metavar="NAME",
        help="a request field to pass over that would be refused by name; may be repeated",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--queue",
        type=_count,
        default=32,
        metavar="N",
        help="requests that may wait; more are answered with 429 (default: %(default)s)",
    )
    limits.add_argument(
        "--parallel",
        type=_count,
        metavar="N",
        help=f"answers at once, each with a KV cache of its own (default: up to {PARALLEL}, as many as fit; "
        "1 for layers on card and CPU)",
    )
    limits.add_argument(
        "--time-limit",
        type=_seconds,
        default=600.0,
        metavar="SECONDS",
        help="longest time from a request's arrival to its end (default: %(default)g)",
    )
    limits.add_argument(
        "--prefix-cache",
        default="128MiB",
        metavar="SIZE",
        help="host memory for the KV cache of earlier prompts' prefixes; 0 turns it off "
        "(default: %(default)s)",
    )
    limits.add_argument(
        "--max-body", default="2MiB", metavar="SIZE", help="largest request body (default: %(default)s)"
    )
    limits.add_argument(
        "--shutdown-seconds",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="time for answers in progress when the server stops (default: %(default)g)",
    )
    parser.add_argument("--no-speculation", action="store_true", help="decode one token at a time")
    parser.add_argument("--quiet", action="store_true", help="print only errors on standard error")


@dataclass(frozen=True)
class Access:
    """Who may use the server."""

    keys: tuple[str, ...]
    """A request needs one of these; empty admits everybody."""
    hosts: tuple[str, ...]
    """Host names beside those of the loopback interface."""


def run(args: argparse.Namespace) -> int:
    """Serve until a signal. Returns the exit code; raises LowmemError."""
    from lowmem.plan.device import host_memory_available, host_memory_private, parse_bytes
    from lowmem.plan.request import plan_or_download

    access = check_access(
        args.host,
        api_key=args.api_key,
        api_key_file=args.api_key_file,
        no_api_key=args.no_api_key,
        allow_host=args.allow_host,
    )
    check_origins(args.allow_origin)
    names = tuple(args.served_name) or (served_name(args.model),)
    max_body = parse_bytes(args.max_body, "--max-body")
    if args.engine == "vllm":
        return _with_vllm(args, names, access, max_body)
    if args.tensor_parallel > 1:
        raise InvalidRequestError(
            "--tensor-parallel divides a model among cards, which lowmem's own server does not",
            "Add --engine vllm, or leave it out",
        )
    prefixes = 0 if args.prefix_cache in _OFF else parse_bytes(args.prefix_cache, "--prefix-cache")
    request = request_of(args)
    say = notifier(args.quiet)
    ram = request.ram_bytes or host_memory_available() + host_memory_private()
    request = replace(request, ram=max(1, ram - OWN_BYTES - prefixes))
    plan = plan_or_download(request, say)
    slots = slots_of(plan, args.parallel)
    from lowmem.server.running import Server, bind, url_of

    with bind(args.host, args.port) as listener:
        say(plan.reason)
        # Imported late: FastAPI and torch take seconds to import, and mistakes are reported before.
        from lowmem.server.app import make_app
        from lowmem.server.guard import GuardSettings, explain
        from lowmem.server.worker import Worker

        loading = Loading(args.model, quiet=args.quiet)

        def load() -> Session:
            speculate = not args.no_speculation
            session = load_session(plan, request, say, loading.update, slots=slots, speculate=speculate)
            if prefixes:
                from lowmem.generate.prefix_store import PrefixStore

                session.engine.store = PrefixStore(prefixes)
            return session

        with loading.shown():
            worker = Worker(
                load,
                queue_limit=args.queue,
                report=lambda error: note(explain(error, "the model's thread")),
            )
            session = _started(worker, quiet=args.quiet)
        app = make_app(
            worker,
            names,
            guard=GuardSettings(access.hosts, access.keys, max_body, tuple(args.allow_origin)),
            time_limit=args.time_limit,
            log=say,
            ignored=args.ignore_field,
        )

        def listening() -> None:
            from lowmem.chat.figures import describe

            if "*" in args.allow_origin and not access.keys:
                say(f"every web page that you visit may use this server: set {KEYS} to require a key")
            say(describe(session.loaded, session.context))
            if slots > 1:
                say(f"up to {slots} answers at once")
            print(f"serving {names[0]} at {url_of(listener)} (API: {url_of(listener)}/v1)", flush=True)

        server = Server(app, worker, shutdown_seconds=args.shutdown_seconds, listening=listening, notify=say)
        server.run([listener])
    if not worker.join(5):
        _leave(0)  # a forward pass is still running
    return 0


def _with_vllm(args: argparse.Namespace, names: tuple[str, ...], access: Access, max_body: int) -> int:
    from lowmem.commands import serve_vllm
    from lowmem.engines.vllm_command import Door

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    door = Door(
        args.host,
        args.port,
        access.keys,
        access.hosts,
        tuple(args.allow_origin),
        max_body,
        prefix_cache=args.prefix_cache not in _OFF,
        shutdown_seconds=args.shutdown_seconds,
    )
    return serve_vllm.run(args, parser.parse_args([args.model]), names, door)


def slots_of(plan: Plan, parallel: int | None) -> int:
    """Answers at once. Raises InvalidRequestError for more than the plan's memory has room for."""
    from lowmem.plan.planner import room_for_slots, slot_bytes, usual_slots

    if parallel is None:
        return usual_slots(plan)
    room = room_for_slots(plan)
    if parallel > room:
        places = [need for need in (plan.chosen.need, plan.chosen.host) if need is not None]
        each = format_bytes(sum(slot_bytes(plan, need) for need in places))
        raise InvalidRequestError(
            f"--parallel {parallel} needs {each} of KV cache for each answer; there is room for {room}",
            f"Use --parallel {room}, or a --context below {plan.context}",
        )
    return parallel


def check_access(
    host: str, *, api_key: str | None, api_key_file: str | None, no_api_key: bool, allow_host: list[str]
) -> Access:
    """Who may use the server. Raises InvalidRequestError for an open server without --no-api-key."""
    from lowmem.text.addresses import host_name, is_loopback

    if api_key is not None:
        raise InvalidRequestError(
            "other users of this machine can read a key on the command line",
            f"Put it into a file for --api-key-file, or into ${KEYS}",
        )
    keys = read_keys(api_key_file)
    if keys and no_api_key:
        raise InvalidRequestError(
            "API keys are set, and --no-api-key is given",
            f"Leave out --no-api-key, or --api-key-file and ${KEYS}",
        )
    if not keys and not no_api_key and not is_loopback(host):
        raise InvalidRequestError(
            f"other machines can reach {host}, and no API key is set",
            f"Set one with --api-key-file or ${KEYS}, or give --no-api-key to admit everybody",
        )
    for name in allow_host:
        if host_name(name) != name.lower():
            raise InvalidRequestError(
                f"--allow-host {name!r} is not a host name",
                "Give only the host name, without http:// or a port",
            )
    return Access(keys, tuple(allow_host))


def check_origins(names: list[str]) -> None:
    """Raises InvalidRequestError for an --allow-origin that no browser sends."""
    from lowmem.server.cors import is_origin

    for name in names:
        if not is_origin(name):
            raise InvalidRequestError(
                f"--allow-origin {name!r} is not an origin",
                "Give scheme, host and port without a path, such as http://localhost:3000; or '*' for all",
            )


def read_keys(path: str | None) -> tuple[str, ...]:
    """The keys of a file, one per line, or of the environment, separated by spaces or commas.

    Raises InvalidRequestError for a key that is too short, or a file without keys.
    """
    if path is not None:
        keys = read_text(path, "Give a file with one key per line").split()
        if not keys:
            raise InvalidRequestError(
                f"{path} contains no key", "Create one with: openssl rand -hex 16 > FILE"
            )
    else:
        keys = os.environ.get(KEYS, "").replace(",", " ").split()
    for key in keys:
        if len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable():
            raise InvalidRequestError(
                f"an API key is shorter than {_SHORTEST_KEY} characters, or not plain ASCII",
                "Create one with: openssl rand -hex 16",
            )
    return tuple(dict.fromkeys(keys))


def served_name(model: str) -> str:
    """The model name in requests: a hub id or a name from the cache unchanged, the last part of a path."""
    path = typed_path(model)
    if not path.exists():
        return model
    name = path.resolve()
    return name.stem if name.is_file() else name.name


def _started(worker: Worker, *, quiet: bool) -> Session:
    try:
        return worker.start()
    except KeyboardInterrupt:
        if not quiet:
            note("interrupted")
        _leave(INTERRUPTED)
        raise


def _leave(code: int) -> None:
    """Exit without waiting for a thread that is loading or in a forward pass."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number < 1 << 16:
        raise argparse.ArgumentTypeError(f"{number} is not a port: use 1 to 65535, or 0 for any free port")
    return number


def _count(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 10_000:
        raise argparse.ArgumentTypeError(f"{number} is not between 1 and 10000")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return number
