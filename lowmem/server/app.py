"""The FastAPI application and its routes."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import asdict
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from lowmem import __version__
from lowmem.plan.device import memory_use
from lowmem.plan.planner import planned_bytes
from lowmem.server import answer_models as models
from lowmem.server.answers import ChatShape, CompletionShape, Shape
from lowmem.server.api_errors import no_such_model
from lowmem.server.door_routes import door_routes
from lowmem.server.error_handlers import add_error_handlers
from lowmem.server.events import Chunks
from lowmem.server.exchange import Exchange
from lowmem.server.guard import Guard, GuardSettings
from lowmem.server.metrics import Metrics, note_of
from lowmem.server.page_routes import page_routes
from lowmem.server.protocol import ChatRequest, CompletionRequest, SamplingFields
from lowmem.server.reading import Asked, Reader
from lowmem.server.worker import Worker

TIME_LIMIT = 600.0
"""Default time limit of a request in seconds, equal to the timeout of OpenAI's client."""
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
_NO_LIMITS = GuardSettings()


def make_app(
    worker: Worker,
    names: tuple[str, ...],
    *,
    guard: GuardSettings = _NO_LIMITS,
    time_limit: float = TIME_LIMIT,
    log: Callable[[str], None] = lambda line: None,
    ignored: Collection[str] = (),
) -> FastAPI:
    """The application on a started worker.

    names: names of the model, the preferred one first. time_limit: seconds from a request's arrival to its
    end. log: receives a line per request. ignored: request fields to pass over.
    """
    loaded, context, created = worker.session.loaded, worker.session.context, int(time.time())
    memory = partial(memory_use, loaded.device)
    metrics = Metrics(worker, memory)
    reader = Reader(loaded, context, worker.session.grammars, ignored)
    exchange = Exchange(worker, metrics, time_limit)
    app = FastAPI(
        title="lowmem",
        summary="A local model behind OpenAI's API",
        version=__version__,
        docs_url=None,  # that page loads scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(Guard, settings=guard, metrics=metrics, log=log)
    add_error_handlers(app)

    def known(name: str | None) -> str:
        if not name:
            return names[0]
        if name not in names:
            raise no_such_model(name, names)
        return name

    async def answer(request: Request, body: SamplingFields, shape: Shape, asked: Asked) -> Response:
        return await exchange.answer(
            request,
            asked,
            Chunks(shape, body.include_usage),
            choices=body.n or 1,
            stream=bool(body.stream),
        )

    @app.post("/v1/chat/completions", responses=models.streamed(models.ChatCompletion), tags=["api"])
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        shape = ChatShape(known(body.model), body.include_usage)
        worker.check_room(note_of(request.scope).client)
        return await answer(request, body, shape, await reader.chat(body))

    @app.post("/v1/completions", responses=models.streamed(models.Completion), tags=["api"])
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Continue a text, or fill in the text between `prompt` and `suffix`."""
        shape = CompletionShape(known(body.model), body.include_usage)
        worker.check_room(note_of(request.scope).client)
        return await answer(request, body, shape, await reader.completion(body))

    app.include_router(door_routes(exchange, reader, worker, known), tags=["api"])

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "lowmem",
            "max_model_len": context,
        }

    @app.get("/v1/models", response_model=models.ModelList, responses=models.ERRORS, tags=["api"])
    async def list_models() -> dict[str, Any]:
        """List the served model under each of its names."""
        return {"object": "list", "data": [card(name) for name in names]}

    @app.get("/v1/models/{name:path}", response_model=models.ModelCard, responses=models.ERRORS, tags=["api"])
    async def show_model(name: str) -> dict[str, Any]:
        """Describe the served model."""
        return card(known(name))

    busy: dict[int | str, dict[str, Any]] = {**models.ERRORS, 503: {"model": models.Health}}

    @app.get("/health", response_model=models.Health, responses=busy, tags=["state"])
    async def health() -> Response:
        """Report readiness: 503 while the server shuts down."""
        return JSONResponse(
            {"status": "shutting down" if worker.closed else "ok"}, 503 if worker.closed else 200
        )

    text: dict[int | str, dict[str, Any]] = {
        **models.ERRORS,
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "The metrics"},
    }

    @app.get("/metrics", response_class=Response, responses=text, tags=["state"])
    async def figures() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(metrics.text(), media_type=_PROMETHEUS)

    plan, option = loaded.plan, loaded.option

    @app.get("/page/status", response_model=models.Status, responses=models.ERRORS, tags=["page"])
    async def status() -> dict[str, Any]:
        """The state that the chat page shows."""
        last = worker.current
        return {
            "model": names[0],
            "label": loaded.label or "unquantized",
            "plan": plan.reason if plan else "",
            "device": str(loaded.device),
            "kernel": loaded.kernel,
            "context": context,
            "weight_bytes": loaded.weight_bytes,
            "need_bytes": planned_bytes(plan, option, worker.slots) if plan and option else 0,
            "tokens_per_second": last.tokens_per_second if last else 0.0,
            "busy": worker.busy,
            "running": worker.running,
            "slots": worker.slots,
            "queue": worker.waiting,
            "memory": asdict(memory()),
        }

    app.include_router(page_routes(), responses=models.ERRORS)
    if guard.keys:
        _describe_keys(app)
    return app


def _describe_keys(app: FastAPI) -> None:
    """Declare the API key in the OpenAPI description."""
    describe = app.openapi

    def described() -> dict[str, Any]:
        schema = describe()
        schema.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
        schema["paths"]["/health"]["get"]["security"] = []
        return schema

    app.openapi = described  # type: ignore[method-assign]
