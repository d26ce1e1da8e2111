"""Routes of further APIs: llama.cpp's /infill, /tokenize and /detokenize, OpenAI's /v1/responses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from lowmem.server import answer_models as models
from lowmem.server.exchange import Exchange
from lowmem.server.infill import InfillRequest, InfillWriter
from lowmem.server.metrics import note_of
from lowmem.server.reading import Reader
from lowmem.server.response_writer import ResponseWriter
from lowmem.server.responses import ResponsesRequest
from lowmem.server.tokens import DetokenizeRequest, TokenizeRequest
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

    @router.post("/v1/responses", responses=models.streamed(models.ModelResponse))
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        """Answer a text or a conversation, as OpenAI's responses API does. Nothing is kept."""
        name = known(body.model)
        worker.check_room(note_of(request.scope).client)
        writer = ResponseWriter(name, body)
        asked = await reader.response(body)
        return await exchange.answer(request, asked, writer, choices=1, stream=bool(body.stream))

    tokens = models.Tokens | models.TokenCount

    @router.post("/tokenize", response_model=None, responses={200: {"model": tokens}, **models.ERRORS})
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The tokens of a text or a conversation, in llama.cpp's form or vLLM's."""
        known(body.model)
        return await reader.tokenize(body)

    @router.post("/detokenize", response_model=models.Detokenized, responses=models.ERRORS)
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """The text of tokens, in llama.cpp's form and vLLM's."""
        known(body.model)
        return await reader.detokenize(body)

    return router
