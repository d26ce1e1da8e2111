"""The command line: arguments and dispatch. A command's module is imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from lowmem import __version__
from lowmem.errors import LowmemError

USER_ERROR = 2
INTERRUPTED = 130
_LOST = (
    "a file of the model cannot be read any more: it was cut short, or its disk is gone. "
    "Put it back (lowmem verify finds which it is), then give the same command again"
)


@dataclass(frozen=True)
class Command:
    """One word after `lowmem`: its module has add_arguments(parser) and run(args) -> exit code."""

    name: str
    module: str
    help: str


COMMANDS = (
    Command("convert", "lowmem.convert.cli", "quantize a checkpoint to 8, 4, 3 or 2 bits with GPTQ"),
    Command("plan", "lowmem.commands.plan", "what every form of a model needs, and which one runs here"),
    Command("run", "lowmem.commands.run", "chat with the best form of a model that fits, or answer a prompt"),
    Command("fim", "lowmem.commands.fim", "fill in what is missing in the middle of a file"),
    Command("serve", "lowmem.commands.serve", "an OpenAI-compatible API, and a chat page for the browser"),
    Command(
        "verify", "lowmem.commands.verify", "check a converted checkpoint, file by file and tensor by tensor"
    ),
    Command("list", "lowmem.commands.list", "the converted checkpoints in lowmem's cache"),
    Command("rm", "lowmem.commands.rm", "remove checkpoints from the cache"),
    Command("doctor", "lowmem.commands.doctor", "check what works on this machine, and say what does not"),
    Command("bench", "lowmem.benchmarks.cli", "measure output quality and latency against bf16, and report"),
    Command(
        "demo",
        "lowmem.benchmarks.demo",
        "convert the embedded model, answer a prompt, measure: a few minutes",
    ),
)


class _Parser(argparse.ArgumentParser):
    """One line for a mistake in the arguments, instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}. See {self.prog} --help", file=sys.stderr)
        raise SystemExit(USER_ERROR)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options; imports no torch."""
    parser = _Parser(
        prog="lowmem",
        description="Run StarChat Alpha, and models like it, in little memory.",
        epilog="lowmem COMMAND --help tells a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"lowmem {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for command in COMMANDS:
        sub = commands.add_parser(command.name, help=command.help, description=command.help)
        importlib.import_module(command.module).add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of `lowmem`; the exit code: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    args = build_parser().parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # of torchao's import, not of ours
    from lowmem.kernels.native.lost_files import lost_files_told

    module = next(command.module for command in COMMANDS if command.name == args.command)
    try:
        with lost_files_told(f"lowmem {args.command}: {_LOST}", USER_ERROR):
            return int(importlib.import_module(module).run(args))
    except LowmemError as error:
        print(f"lowmem {args.command}: {error}", file=sys.stderr)
        return USER_ERROR
    except BrokenPipeError:
        # Whoever read our output has gone: that is no failure of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, RuntimeError, OSError) as error:
        from lowmem.checkpoint.files.reading import one_line
        from lowmem.plan.device import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print(
            f"lowmem {args.command}: memory ran out: {one_line(error)}. Close other programs, or ask for "
            "fewer bits or a shorter --context",
            file=sys.stderr,
        )
        return USER_ERROR
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
