"""Routes of the chat page: its files, read once, and Markdown rendering."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from fastapi import APIRouter, HTTPException, Request, Response
from pydantic import BaseModel, Field

from lowmem.server.page_render import LONGEST_TEXT, render

PAGE_FOLDER = Path(__file__).parent / "page"
INDEX = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
_MOST_WAITING = 16  # texts waiting to be rendered; a page sends one at a time


@dataclass(frozen=True)
class PageFile:
    """A static file."""

    content: bytes
    media_type: str
    tag: str
    """The ETag, a digest of the content."""
    caching: str
    """Cache-Control. With "no-cache" browsers revalidate, so a page never mixes files of two versions."""


class RenderRequest(BaseModel):
    """A Markdown text whose lines end with "\\n"."""

    text: str = Field(max_length=LONGEST_TEXT)


class RenderAnswer(BaseModel):
    """The top-level blocks, and the line and block from which they may still change; see `page_render`."""

    blocks: list[Any]
    settled: int
    settled_blocks: int


def load_page(folder: Path = PAGE_FOLDER) -> dict[str, PageFile]:
    """The files of the page by name. Paths are never built from a request."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in _TYPES:
            content = path.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            caching = "max-age=86400" if path.suffix == ".svg" else "no-cache"
            files[path.name] = PageFile(content, _TYPES[path.suffix], tag, caching)
    return files


def page_routes() -> APIRouter:
    """GET / and /page/NAME, which need no key, and POST /page/render, which needs one if keys are set."""
    files = load_page()
    router = APIRouter()
    rendering = anyio.Semaphore(1)  # leaves the processor to the model's threads
    waiting = 0

    for name, file in files.items():
        path = "/" if name == INDEX else f"/page/{name}"
        router.add_api_route(path, _sender(file), methods=["GET", "HEAD"], include_in_schema=False)

    @router.post("/page/render", response_model=RenderAnswer, tags=["page"])
    async def render_text(body: RenderRequest) -> RenderAnswer:
        """Render a Markdown text as a tree of a closed set of nodes, for the page at /."""
        nonlocal waiting
        if waiting >= _MOST_WAITING:
            raise HTTPException(429, "too many texts are waiting to be rendered", {"Retry-After": "1"})
        waiting += 1
        try:
            async with rendering:
                rendered = await anyio.to_thread.run_sync(render, body.text)
        finally:
            waiting -= 1
        return RenderAnswer(
            blocks=rendered.blocks, settled=rendered.settled, settled_blocks=rendered.settled_blocks
        )

    return router


def _sender(file: PageFile) -> Callable[[Request], Response]:
    """A route that sends the file, or status 304 if the browser's copy is current."""

    def send(request: Request) -> Response:
        headers = {"ETag": file.tag, "Cache-Control": file.caching}
        known = request.headers.get("if-none-match", "").split(",")
        if {file.tag, "*"} & {tag.strip().removeprefix("W/") for tag in known}:
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.media_type, headers=headers)

    return send
