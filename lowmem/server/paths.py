"""Request paths as clients write them: a slash at the end, /v1 left out or given twice, HEAD for GET."""

from __future__ import annotations

import re

from starlette.types import Scope

_API = ("chat/completions", "completions", "models", "responses")
_ROOT = re.compile(r"(?:/v1)+/(infill|tokenize|detokenize)")
_SHORT = re.compile(r"(?:/v1)*/(" + "|".join(_API) + r")(/.*)?", re.DOTALL)
OTHER_APIS = {
    "/v1/messages": "Anthropic's API is not here. Use /v1/chat/completions",
    "/v1/embeddings": "This model makes no embeddings. It serves /v1/chat/completions and /v1/completions",
    "/completion": "llama.cpp's own API is not here. Use /v1/completions or /infill",
    "/api/chat": "Ollama's own API is not here. Use /v1/chat/completions",
    "/api/generate": "Ollama's own API is not here. Use /v1/completions",
    "/api/tags": "Ollama's own API is not here. Use /v1/models",
    "/generate": "text-generation-inference's own API is not here. Use /v1/completions",
}
"""What a path of another API answers, which clients ask for when they take this server for another."""


def as_meant(scope: Scope) -> Scope:
    """The request that an ASGI scope means: without variants of paths, and GET for HEAD, whose response the
    server sends without its body."""
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "method": method, "path": path_meant(scope["path"])}


def path_meant(path: str) -> str:
    """The path that is meant: "/v1/models" for "/models/" and "/v1/v1/models"."""
    path = re.sub("/{2,}", "/", path)
    if len(path) > 1:
        path = path.removesuffix("/")
    if root := _ROOT.fullmatch(path):
        return f"/{root.group(1)}"
    match = _SHORT.fullmatch(path)
    return f"/v1/{match.group(1)}{match.group(2) or ''}" if match else path


def hint(path: str) -> str:
    """The next step for a path that is not served."""
    path = path_meant(path)
    if path.startswith("/v1/responses/"):
        return "Responses are not kept. Send the whole conversation to /v1/responses"
    found = OTHER_APIS.get(path) or OTHER_APIS.get(f"/v1{path}")
    return found or "The API is at /v1: /v1/models, /v1/chat/completions and /v1/completions"
