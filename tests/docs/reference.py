"""Writes docs/commands.md, the reference of all commands, from their parsers.

python -m tests.docs.reference
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from lowmem.cli import COMMANDS, Parser, command_parser

FILE = Path(__file__).parents[2] / "docs" / "commands.md"
_HEAD = """\
# Commands

Every command and every option. `python -m tests.docs.reference` writes this page from the parsers.
"""


def parsers() -> Iterator[Parser]:
    """The parser of each command, and of each word after `lowmem bench`."""
    for command in COMMANDS:
        parser = command_parser(command)
        yield parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from action.choices.values()


def reference() -> str:
    """The page."""
    return "\n".join([_HEAD, *(_section(parser) for parser in parsers())])


def _section(parser: Parser) -> str:
    lines = [f"## {parser.prog}", "", parser.description or "", ""]
    rows = [(_name(a), _help(parser, a)) for a in parser._actions if _shown(a)]
    lines += ["| argument | |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, text in rows]
    return "\n".join(lines) + "\n"


def _shown(action: argparse.Action) -> bool:
    return action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)


def _name(action: argparse.Action) -> str:
    if isinstance(action, argparse._SubParsersAction):
        return "`" + "`, `".join(action.choices) + "`"
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if not action.option_strings:
        return f"`{metavar}`"
    value = "" if action.nargs == 0 else f" {metavar}"
    if action.choices is not None and action.metavar is None:
        value = " " + "|".join(str(choice) for choice in action.choices)
    return ", ".join(f"`{option}{value}`" for option in action.option_strings).replace("|", "\\|")


def _help(parser: Parser, action: argparse.Action) -> str:
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    FILE.write_text(reference(), encoding="utf-8")
    print(f"wrote {FILE}")
