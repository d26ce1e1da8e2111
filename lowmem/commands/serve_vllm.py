"""`lowmem serve MODEL --engine vllm`: the version chosen, vLLM's command written, its process watched."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lowmem.chat.loading import Loading
from lowmem.commands.answering import INTERRUPTED, notifier
from lowmem.commands.plan_options import request_of
from lowmem.engines.card_memory import CardMemory, card_memories
from lowmem.engines.folder import check_folder
from lowmem.engines.installed import Vllm, find_vllm
from lowmem.engines.process import EngineEnded, Interrupts, ServerProcess, reachable
from lowmem.engines.vllm_command import Door, Launch, Ranks, Served, copy_door, launch
from lowmem.engines.vllm_plan import Choice, Room, choose
from lowmem.engines.words import cause, doing
from lowmem.errors import InvalidRequestError
from lowmem.plan.device import host_memory_available
from lowmem.plan.planner import PARALLEL
from lowmem.plan.request import ModelRequest, context_of, find_or_download, vram_of_environment
from lowmem.platform import system

Say = Callable[[str], None]
_SHARE = 0.92
"""Of a card's memory that vLLM fills by default."""
_SPARE = 0.02
"""Of a card's memory that stays free beside what others use: vLLM refuses to start with less."""
_ITSELF = "Leave it out, or serve without --engine vllm"
_REFUSED = {
    "activation_bits": "vLLM computes activations in 16 bits",
    "draft": "draft models are not passed on to vLLM",
    "ignore_field": "vLLM passes over all fields that it does not know",
    "queue": "vLLM's queue has no limit",
    "time_limit": "vLLM has no time limit for requests",
}
"""Options that vLLM cannot honour, and why."""


def run(args: argparse.Namespace, defaults: argparse.Namespace, names: tuple[str, ...], door: Door) -> int:
    """Serve with vLLM until a signal. Returns the exit code; raises LowmemError.

    defaults: the options' values where none was given. door: whom to admit; its port may be 0.
    """
    refuse_options(args, defaults, door)
    request = request_of(args)
    say = notifier(args.quiet)
    vllm = find_vllm()
    cards = cards_for(request.device, args.tensor_parallel, vllm)
    room = room_for(request, cards, args)
    candidates = find_or_download(request, say, cuda=room.on_cards)
    context = context_of(request, candidates)
    choice = choose(candidates, vllm, room, context, request.dtype)
    url, door = _free_address(door)
    say(choice.reason)
    if choice.method and not cards and lacks_avx512():
        say("vLLM's CPU kernel for 4 bits needs AVX-512, which this CPU lacks: the first answer may end it")
    place = Path(tempfile.mkdtemp(prefix="lowmem-vllm-"))
    keep = False
    try:
        facts = check_folder(choice.candidate.path, choice.candidate.shape, say, digests=request.check)
        template, generation = facts.write(place)
        served = Served(
            choice.candidate.path.resolve(),
            names,
            choice.candidate.shape.model_type,
            choice.dtype,
            context,
            choice.method,
            facts.quantization,
            template,
            generation,
        )
        copy_door(place)
        ranks = ranks_for(room, cards, choice)
        door = replace(door, sequences=args.parallel or room.sequences, trims=facts.trims)
        return _serve(launch(vllm, served, ranks, door, place), place, (url, door), names[0], args)
    except EngineEnded:
        keep = True
        raise
    finally:
        if not keep:
            shutil.rmtree(place, ignore_errors=True)


def _serve(
    command: Launch, place: Path, address: tuple[str, Door], name: str, args: argparse.Namespace
) -> int:
    """Run the command until it or we are told to end."""
    url, door = address
    say, log = notifier(args.quiet), place / "vllm.log"
    say(f"starting: {command.shown}")
    say(f"its log: {log}")
    interrupts = Interrupts()
    server = ServerProcess((reachable(door.host), door.port), log, interrupts)
    path = os.pathsep.join(filter(None, (command.secret["PYTHONPATH"], os.environ.get("PYTHONPATH"))))
    loading = Loading(args.model, quiet=args.quiet)

    def progress(seconds: float) -> None:
        what = doing(log)
        loading.text = f"vLLM is starting, {seconds:.0f} s" + (f": {what}" if what else "")

    with interrupts.caught():
        server.start(command.words, {**command.environment, **command.secret, "PYTHONPATH": path})
        try:
            with loading.shown():
                ready = server.wait_until_ready(progress)
            if not ready:
                server.stop(0)
                say("interrupted")
                return INTERRUPTED
            print(f"serving {name} at {url} (API: {url}/v1)", flush=True)
            server.watch(lambda line: say(f"vLLM: {line}"))
            say("finishing the running answers; press Ctrl-C again to exit at once")
            return 0 if server.stop(door.shutdown_seconds) else INTERRUPTED
        except EngineEnded as error:
            code = server.code
            told = cause(log) or f"exit code {code}"
            what = "ended" if error.was_ready else "could not start"
            raise EngineEnded(f"vLLM {what}: {told}", f"Its log is {log}") from None
        finally:
            server.stop(0)


def refuse_options(args: argparse.Namespace, defaults: argparse.Namespace, door: Door) -> None:
    """Raise InvalidRequestError for the first option that vLLM cannot honour."""
    for name, why in _REFUSED.items():
        if getattr(args, name) != getattr(defaults, name):
            raise InvalidRequestError(f"--{name.replace('_', '-')} and --engine vllm: {why}", _ITSELF)
    if args.quantize in ("int8", "nf4"):
        raise InvalidRequestError(
            f"--quantize {args.quantize} and --engine vllm: vLLM does not quantize with bitsandbytes", _ITSELF
        )
    if args.head_bits == "8":
        raise InvalidRequestError("--head-bits 8 and --engine vllm: vLLM keeps heads in 16 bits", _ITSELF)
    if args.prefix_cache != defaults.prefix_cache and door.prefix_cache:
        raise InvalidRequestError(
            f"--prefix-cache {args.prefix_cache} and --engine vllm: vLLM keeps prefixes in its KV cache, "
            "where they have no size of their own",
            "Leave it out, or turn them off with --prefix-cache 0",
        )
    for origin in args.allow_origin:
        if origin != "*" and "*" in origin:
            raise InvalidRequestError(
                f"--allow-origin {origin} and --engine vllm: vLLM compares whole origins",
                "Name each origin, or serve without --engine vllm",
            )


def cards_for(device: str, ranks: int, vllm: Vllm) -> list[CardMemory]:
    """The cards of the ranks; empty for a vLLM that is built for CPUs.

    Raises InvalidRequestError for a device that the installed vLLM does not use, or too few cards.
    """
    if vllm.build == "cpu":
        if device not in ("auto", "cpu"):
            raise InvalidRequestError(
                f"--device {device}: {vllm.executable} is vLLM's build for CPUs", "Install vLLM for your card"
            )
        return []
    if device == "cpu":
        raise InvalidRequestError(
            f"--device cpu: {vllm.executable} is vLLM's build for cards",
            "Install vLLM's build for CPUs in an environment of its own, or serve without --engine vllm",
        )
    kind, _, number = device.partition(":")
    found = [card for card in card_memories() if kind in ("auto", card.type)]
    found = [card for card in found if card.type == found[0].type]
    if number:
        first = int(number) if number.isdecimal() else -1
        found = [card for card in found if card.index >= first >= 0]
    if len(found) < ranks:
        have = {0: "no card", 1: "one card"}.get(len(found), f"{len(found)} cards")
        raise InvalidRequestError(
            f"--tensor-parallel {ranks} needs as many cards, and {have} of --device {device} can be used",
            "Use a smaller --tensor-parallel"
            if found
            else "Install the driver, or vLLM's build for CPUs, or serve without --engine vllm",
        )
    return found[:ranks]


def room_for(request: ModelRequest, cards: list[CardMemory], args: argparse.Namespace) -> Room:
    """The memory of each rank. Raises InvalidRequestError for more ranks than cores of the CPU."""
    ranks = args.tensor_parallel
    if cards:
        if request.ram is not None:
            raise InvalidRequestError(
                "--ram and --engine vllm: on cards, the host's memory is not limited", _ITSELF
            )
        vram = request.vram_bytes or vram_of_environment()
        free = min(vram or int(share_of(card) * card.total) for card in cards)
        return Room(ranks, free, on_cards=True, sequences=args.parallel)
    if request.vram is not None:
        raise InvalidRequestError(
            "--vram needs a card, and this vLLM is built for CPUs", "Use --ram SIZE to limit the memory"
        )
    cores = len(sorted(system.usable_cores()))
    if ranks > cores:
        raise InvalidRequestError(
            f"--tensor-parallel {ranks} needs as many CPU cores, and {cores} can be used",
            "Use a smaller number",
        )
    host = request.ram_bytes or host_memory_available()
    return Room(ranks, host // ranks, on_cards=False, sequences=args.parallel or PARALLEL)


def share_of(card: CardMemory) -> float:
    """The share of a card's memory that vLLM may fill, beside what other programs hold, in hundredths."""
    return int(100 * max(0.0, min(_SHARE, card.free / card.total - _SPARE))) / 100


def ranks_for(room: Room, cards: list[CardMemory], choice: Choice) -> Ranks:
    """The processes, and what each may use."""
    if not cards:
        return Ranks(
            room.ranks, cores=split_cores(sorted(system.usable_cores()), room.ranks), kv_bytes=choice.kv_cache
        )
    share = min(min(share_of(card), room.bytes / card.total) for card in cards)
    # torch numbers what $CUDA_VISIBLE_DEVICES lists, by numbers or by names.
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    numbers = [visible[card.index] if card.index < len(visible) else str(card.index) for card in cards]
    return Ranks(room.ranks, tuple(numbers), int(100 * share + 1e-6) / 100)


def split_cores(cores: list[int], ranks: int) -> tuple[str, ...]:
    """The cores of each rank, as vLLM reads them: "0,1"."""
    each = len(cores) // ranks
    return tuple(",".join(map(str, cores[rank * each : (rank + 1) * each])) for rank in range(ranks))


def lacks_avx512() -> bool:
    """Whether this is an x86 CPU that is known to lack AVX-512."""
    flags = system.processor_flags()
    return "sse2" in flags and "avx512f" not in flags


def _free_address(door: Door) -> tuple[str, Door]:
    """The URL, and the door with a port that is free now. Raises InvalidRequestError for one in use."""
    from lowmem.server.running import bind, url_of

    with bind(door.host, door.port) as listener:
        return url_of(listener), replace(door, port=int(listener.getsockname()[1]))
