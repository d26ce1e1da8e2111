"""What goes wrong, as OpenAI's error objects: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowmem.errors import LowmemError

NOT_AGAIN = {"x-should-retry": "false"}
"""A header that tells OpenAI's clients not to send the same request again by themselves."""


class ApiError(Exception):
    """An answer that is an error.

    status: of HTTP. kind: the object's `type`. param: the field at fault. code: what a program can tell it
    by. headers: to be sent with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The object that is sent."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request asks for what cannot be done."""
    return ApiError(400, message, param=param, code=code)


def invalid_request(error: LowmemError, param: str | None = None) -> ApiError:
    """400, in the words of one of our own errors."""
    return invalid(str(error), param)


def no_such_model(name: str, served: Sequence[str]) -> ApiError:
    """404: another model is served here."""
    return ApiError(
        404,
        f"The model {short(name)!r} does not exist here. Served is {', '.join(map(repr, served))}",
        param="model",
        code="model_not_found",
    )


def too_long(prompt_tokens: int, context: int, param: str) -> ApiError:
    """400: the prompt does not fit the context. Editors look for this code, and for these words."""
    return invalid(
        f"This model's maximum context length is {context} tokens. However, your {param} resulted in "
        f"{prompt_tokens} tokens. Please reduce the length of the {param}.",
        param,
        "context_length_exceeded",
    )


def queue_full(seconds: int) -> ApiError:
    """429: as many requests wait as may; `seconds` until another try makes sense."""
    return ApiError(
        429,
        f"Too many requests are waiting for the model. Try again in {seconds} s",
        kind="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": str(seconds)},
    )


def time_is_up(seconds: float) -> ApiError:
    """503: the time limit has passed before the first token."""
    return ApiError(
        503,
        f"The time limit of {seconds:g} s passed before the answer began: the model is busy",
        kind="server_error",
        code="time_limit",
        headers=NOT_AGAIN,
    )


def shutting_down() -> ApiError:
    """503: the server ends."""
    return ApiError(
        503,
        "The server is shutting down",
        kind="server_error",
        code="shutting_down",
        headers=NOT_AGAIN,
    )


def too_slow() -> ApiError:
    """503: more of the answer waits for its reader than is kept."""
    return ApiError(
        503,
        "The answer was given up: it was not read",
        kind="server_error",
        code="unread",
        headers=NOT_AGAIN,
    )


def failed() -> ApiError:
    """500: a fault of ours; what it was is in the server's log."""
    return ApiError(
        500,
        "The server failed to answer this request; its log says why",
        kind="server_error",
        code="internal_error",
        headers=NOT_AGAIN,
    )


def short(text: str, longest: int = 100) -> str:
    """A text of a request, cut to what belongs into a message."""
    return text if len(text) <= longest else text[: longest - 1] + "…"
