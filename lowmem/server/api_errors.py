"""Errors as OpenAI's error objects: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowmem.errors import LowmemError

NOT_AGAIN = {"x-should-retry": "false"}
"""A header that keeps OpenAI's clients from retrying automatically."""


class ApiError(Exception):
    """An error response.

    status: the HTTP status. kind: the `type` of the error object. param: the field at fault. code: a
    machine-readable name. headers: additional HTTP headers.
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
        """The response body."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request cannot be served."""
    return ApiError(400, message, param=param, code=code)


def invalid_request(error: LowmemError, param: str | None = None) -> ApiError:
    """400, with the message of a LowmemError."""
    return invalid(str(error), param)


def no_such_model(name: str, served: Sequence[str]) -> ApiError:
    """404: the server has another model."""
    return ApiError(
        404,
        f"The model {short(name)!r} is not served here. Use {' or '.join(map(repr, served))}",
        param="model",
        code="model_not_found",
    )


def too_long(prompt_tokens: int, context: int, param: str) -> ApiError:
    """400: the prompt exceeds the context.

    Editor plug-ins look for exactly this code and message, so do not change them.
    """
    return invalid(
        f"This model's maximum context length is {context} tokens. However, your {param} resulted in "
        f"{prompt_tokens} tokens. Please reduce the length of the {param}.",
        param,
        "context_length_exceeded",
    )


def queue_full(seconds: int) -> ApiError:
    """429: the queue is full; the client should try again after `seconds`."""
    return ApiError(
        429,
        f"Too many requests are waiting for the model. Try again in {seconds} s",
        kind="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": str(seconds)},
    )


def time_is_up(seconds: float) -> ApiError:
    """503: the time limit passed before the first token."""
    return ApiError(
        503,
        f"The time limit of {seconds:g} s passed before the answer started, because the model is busy",
        kind="server_error",
        code="time_limit",
        headers=NOT_AGAIN,
    )


def shutting_down() -> ApiError:
    """503: the server is shutting down."""
    return ApiError(
        503,
        "The server is shutting down",
        kind="server_error",
        code="shutting_down",
        headers=NOT_AGAIN,
    )


def too_slow() -> ApiError:
    """503: the client reads too slowly."""
    return ApiError(
        503,
        "The answer was cancelled because the client did not read it",
        kind="server_error",
        code="unread",
        headers=NOT_AGAIN,
    )


def failed() -> ApiError:
    """500: an internal error; the server's log has the details."""
    return ApiError(
        500,
        "Internal error; see the log of the server",
        kind="server_error",
        code="internal_error",
        headers=NOT_AGAIN,
    )


def short(text: str, longest: int = 100) -> str:
    """A text of a request, shortened for a message."""
    return text if len(text) <= longest else text[: longest - 1] + "…"
