"""One line of the doctor's report, and how a check that breaks becomes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "missing"]


@dataclass(frozen=True)
class Check:
    """What was looked at and found.

    status: "ok"; "warning", it works but slower or with less; "missing", something that is needed is not
    there or does not work. advice: what to do about it.
    """

    area: str
    name: str
    status: Status
    detail: str
    advice: str = ""

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
    """What `look` finds; a text is "ok". A failure of any kind is a line of `status` with `advice`."""
    from lowmem.checkpoint.files.reading import one_line

    try:
        found = look()
    except Exception as error:  # the doctor is called when things are broken, so everything may fail
        return Check(area, name, status, f"{type(error).__name__}: {one_line(error)}", advice)
    return found if isinstance(found, Check) else Check(area, name, "ok", found)


def passed(checks: list[Check]) -> bool:
    """Everything that is needed works."""
    return all(check.status != "missing" for check in checks)


Checks = Iterator[Check]
"""What a part of the report gives, a line when it is found."""
