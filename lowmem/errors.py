"""The exceptions of lowmem.

A `LowmemError` is a mistake or a limit that the user can act on. The command line prints it in one line and
exits with 2. Any other exception is a bug: one line says what to report, and --debug shows the traceback.
"""

MAX_MESSAGE = 4000
"""Characters of the longest message."""


def printable(text: str) -> str:
    """The text in one line, without control characters: they are escaped as in a Python string."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    half = MAX_MESSAGE // 2  # the problem often follows a long name
    return text if len(text) <= MAX_MESSAGE else f"{text[: half - 1]}…{text[-half:]}"


class LowmemError(Exception):
    """A mistake or a limit that the user can act on.

    message: the problem, with the file, tensor or option at fault. hint: the next step.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """One line that is safe to print: names from files are escaped."""
        return printable(f"{self.message}. {self.hint}" if self.hint else self.message)


class SourceError(LowmemError):
    """The checkpoint is missing, damaged, or of a kind that lowmem cannot read."""


class ForeignError(SourceError):
    """The checkpoint is whole, and in a format that lowmem does not read; the message names it."""


class ArchitectureError(LowmemError):
    """The model is not a stack of decoder layers with plain linears."""


class RecipeError(LowmemError):
    """A setting is impossible, or differs from that of the conversion in progress."""


class CalibrationError(LowmemError):
    """The calibration text cannot be read, or is too short."""


class MemoryBudgetError(LowmemError):
    """The work does not fit in the available memory."""


class OutOfMemoryError(MemoryBudgetError, MemoryError):
    """An allocation failed. Also a `MemoryError`, so that a smaller version is tried."""


class OutputError(LowmemError):
    """The output cannot be written: the folder exists, the disk is full, or permission is missing."""


class VerifyError(LowmemError):
    """A converted checkpoint is damaged; the message names the file and the tensor."""


class InvalidRequestError(LowmemError):
    """A prompt or a setting that the model cannot serve."""
