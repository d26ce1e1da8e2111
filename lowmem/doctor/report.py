"""A line of the report, and checks that fail turned into one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "missing", "skipped"]
"""missing: a requirement is absent or fails. warning: works, but slower or with less. skipped: not tried."""


@dataclass(frozen=True)
class Check:
    """A check and its result."""

    area: str
    """The part of the machine, such as "card" or "kernels on cpu"."""
    name: str
    status: Status
    detail: str
    """What was found."""
    advice: str = ""
    """What to do about it."""

    def __str__(self) -> str:
        advice = f". {self.advice}" if self.advice else ""
        return f"{self.status:<8} {self.area}: {self.name}: {self.detail}{advice}"


def guarded(
    area: str,
    name: str,
    look: Callable[[], Check | str],
    advice: str = "",
    status: Status = "missing",
) -> Check:
    """The result of `look`; a text means "ok". Any exception becomes a Check with `status` and `advice`."""
    from lowmem.checkpoint.files.reading import one_line

    try:
        found = look()
    except Exception as error:  # on a broken installation anything may be raised
        return Check(area, name, status, f"{type(error).__name__}: {one_line(error)}", advice)
    return found if isinstance(found, Check) else Check(area, name, "ok", found)


def passed(checks: list[Check]) -> bool:
    """Whether no requirement is missing."""
    return all(check.status != "missing" for check in checks)


Checks = Iterator[Check]
"""Checks in the order of the report, each yielded as soon as it is done."""
