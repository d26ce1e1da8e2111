"""Turns every error in FastAPI into an OpenAI error object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from lowmem.server.answers import to_json
from lowmem.server.api_errors import ApiError, invalid, short
from lowmem.server.paths import hint

_TYPES = {429: "rate_limit_error", 401: "authentication_error"}


def add_error_handlers(app: FastAPI) -> None:
    """Install handlers for ApiError, routing errors and validation errors."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)


def response_of(error: ApiError) -> Response:
    """The response for an error."""
    return Response(to_json(error.body()), error.status, error.headers, "application/json")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return response_of(error)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return response_of(explained(error.errors()))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message, code = str(error.detail), None
    if error.status_code == 400:  # FastAPI's status for a body that json cannot parse
        message = "The body cannot be parsed: send JSON in UTF-8, not nested too deeply"
    if error.status_code in (404, 405):
        message = f"Invalid URL ({request.method} {short(request.url.path)}). {hint(request.url.path)}"
        code = "unknown_url"
    kind = (
        "server_error" if error.status_code >= 500 else _TYPES.get(error.status_code, "invalid_request_error")
    )
    return response_of(ApiError(error.status_code, message, kind=kind, code=code, headers=error.headers))


def explained(errors: Sequence[dict[str, Any]]) -> ApiError:
    """One status-400 error about the first field that pydantic rejects. It never quotes the request."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return invalid(f"The body is not JSON: {first['ctx']['error']} (at character {first['loc'][-1]})")
    param = param_of(first["loc"])
    # A field with a union type has one error per type.
    messages = dict.fromkeys(
        str(entry["msg"])
        for entry in errors
        if param_of(entry["loc"]) == param and entry["type"] != "missing"
    )
    message = "; or ".join(list(messages)[:4]) or str(first["msg"])
    return invalid(f"{param}: {message}" if param else message, param)


def param_of(location: Sequence[str | int]) -> str | None:
    """("body", "messages", 0, "content", "str") → messages[0].content; names of union types are dropped."""
    param = ""
    for step in location[1:]:
        if isinstance(step, int):
            param += f"[{step}]"
        elif step.isidentifier() and step not in ("str", "int", "float", "bool"):
            param += f".{step}" if param else step
    return short(param) if param else None
