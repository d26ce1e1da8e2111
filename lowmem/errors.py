"""What can go wrong, in the user's words.

Every error that a user can cause or mend is a `LowmemError`: one line that says what is wrong, and
one that says what to do next. The command line prints them and exits with 2. Anything else is a bug
of ours and keeps its traceback.
"""


class LowmemError(Exception):
    """A mistake or a limit that the user can act on.

    `message` names the file, tensor or option at fault; `hint` says what to type or change next.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message


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


class OutputError(LowmemError):
    """The result cannot be written: the folder exists, the disk is full, no permission."""


class VerifyError(LowmemError):
    """A converted checkpoint is damaged; `message` names the file and the tensor."""


class InvalidRequestError(LowmemError):
    """A prompt or a setting that the model cannot serve."""
