"""Routes of other servers' APIs: llama.cpp's /infill."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter, Request, Response

from lowmem.server import answer_models as models
from lowmem.server.exchange import Exchange
from lowmem.server.infill import InfillRequest, InfillWriter
from lowmem.server.metrics import note_of
from lowmem.server.reading import Reader
from lowmem.server.worker import Worker


def door_routes(
    exchange: Exchange, reader: Reader, worker: Worker, known: Callable[[str | None], str]
) -> APIRouter:
    """The routes. known: returns the served name for a request's, or raises ApiError."""
    router = APIRouter()
    filled = models.streamed(models.Infilled | list[models.Infilled])

    @router.post("/infill", responses=filled)
    async def infill(body: InfillRequest, request: Request) -> Response:
        """Fill in the text between two texts, as llama.cpp's plug-ins for editors ask for it."""
        name = known(body.model)
        worker.check_room(note_of(request.scope).client)
        asked = await reader.infill(body)
        writer = InfillWriter(name, body, asked.works[0].params, reader.context)
        return await exchange.answer(request, asked, writer, choices=body.answers, stream=bool(body.stream))

    return router
