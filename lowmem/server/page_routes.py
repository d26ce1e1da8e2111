"""The chat page: its files, read once, and the route that renders markdown for it."""

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
_MOST_WAITING = 16  # texts that wait to be rendered; the page sends one at a time


@dataclass(frozen=True)
class PageFile:
    """A static file as it is sent.

    tag: its ETag, the same as long as its bytes are. caching: "no-cache" is kept, and asked about each time,
    so that a page is never made of files of two versions; a browser asks for icons all the time.
    """

    content: bytes
    media_type: str
    tag: str
    caching: str


class RenderRequest(BaseModel):
    """A markdown text; its lines end with "\\n" alone."""

    text: str = Field(max_length=LONGEST_TEXT)


class RenderAnswer(BaseModel):
    """The text's top-level blocks, and from which line and block on they may change; see `page_render`."""

    blocks: list[Any]
    settled: int
    settled_blocks: int


def load_page(folder: Path = PAGE_FOLDER) -> dict[str, PageFile]:
    """The page's files by name. No path is ever made of a request's words."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in _TYPES:
            content = path.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            caching = "max-age=86400" if path.suffix == ".svg" else "no-cache"
            files[path.name] = PageFile(content, _TYPES[path.suffix], tag, caching)
    return files


def page_routes() -> APIRouter:
    """GET / and /page/NAME, which need no key, and POST /page/render, which does where there is one."""
    files = load_page()
    router = APIRouter()
    rendering = anyio.Semaphore(1)  # the model's threads want the processor more
    waiting = 0

    for name, file in files.items():
        path = "/" if name == INDEX else f"/page/{name}"
        router.add_api_route(path, _sender(file), methods=["GET", "HEAD"], include_in_schema=False)

    @router.post("/page/render", response_model=RenderAnswer, tags=["page"])
    async def render_text(body: RenderRequest) -> RenderAnswer:
        """A markdown text as a tree of a closed set of nodes, for the page at /."""
        nonlocal waiting
        if waiting >= _MOST_WAITING:
            raise HTTPException(429, "too many texts wait to be rendered", {"Retry-After": "1"})
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
    """A route that sends the file, or says that the browser's copy of it is the current one."""

    def send(request: Request) -> Response:
        headers = {"ETag": file.tag, "Cache-Control": file.caching}
        known = request.headers.get("if-none-match", "").split(",")
        if {file.tag, "*"} & {tag.strip().removeprefix("W/") for tag in known}:
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.media_type, headers=headers)

    return send
