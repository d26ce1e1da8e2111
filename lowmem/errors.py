"""What can go wrong, in the user's words.

Every error that a user can cause or mend is a `LowmemError`: one line that says what is wrong, and
one that says what to do next. The command line prints them and exits with 2. Anything else is a bug
of ours and keeps its traceback.
"""

MAX_MESSAGE = 4000
"""Characters of one."""


def printable(text: str) -> str:
    """One line of text that a terminal shows and does not obey: what cannot be shown as Python spells it."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    half = MAX_MESSAGE // 2  # what is wrong is often said behind a name
    return text if len(text) <= MAX_MESSAGE else f"{text[: half - 1]}…{text[-half:]}"


class LowmemError(Exception):
    """A mistake or a limit that the user can act on.

    `message` names the file, tensor or option at fault; `hint` says what to type or change next.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """One line, whatever names a file brought along: nothing in it steers a terminal."""
        return printable(f"{self.message}. {self.hint}" if self.hint else self.message)


class SourceError(LowmemError):
    """The checkpoint to read is missing, damaged, or not one that can be converted."""


class ArchitectureError(LowmemError):
    """The model's structure is not one of decoder layers made of plain linears."""


class RecipeError(LowmemError):
    """The asked quantization is impossible, or differs from that of the job in progress."""


class CalibrationError(LowmemError):
    """The calibration text cannot be read, or is too short."""


class MemoryBudgetError(LowmemError):
    """The work would not fit the memory that it may use."""


class OutOfMemoryError(MemoryBudgetError, MemoryError):
    """Memory that was asked for cannot be had: a `MemoryError` too, so that a smaller form may be tried."""


class OutputError(LowmemError):
    """The result cannot be written: the folder exists, the disk is full, no permission."""


class VerifyError(LowmemError):
    """A converted checkpoint is damaged; `message` names the file and the tensor."""


class InvalidRequestError(LowmemError):
    """A prompt or a setting that the model cannot serve."""
