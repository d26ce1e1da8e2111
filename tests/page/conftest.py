"""A live server, and pages on it in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.page.chat import SCRIPTS, Chat
from tests.page.live import LiveServer, live_server


@pytest.fixture(scope="package")
def server() -> Iterator[LiveServer]:
    with live_server(SCRIPTS) as running:
        yield running


@pytest.fixture
def make_chat(browser, server) -> Iterator[Any]:
    """Open pages, each in its own browser context. No page may log to the console or contact another
    server."""
    made: list[Chat] = []

    def make(on: LiveServer = server, *, refusals: bool = False, **options: Any) -> Chat:
        options = {"viewport": {"width": 1280, "height": 800}, **options}
        context = browser.new_context(**options)
        context.set_default_timeout(60_000)  # a busy machine must not fail the test
        made.append(Chat(context, on))
        made[-1].refusals = refusals
        return made[-1]

    yield make
    while server.session.go.acquire(blocking=False):
        pass
    for chat in made:
        said = chat.said
        if chat.refusals:  # the browser logs refused requests itself
            said = [line for line in said if "Failed to load resource" not in line]
        assert said == []
        assert [
            url for url in chat.asked if not url.startswith((chat.server.url, f"blob:{chat.server.url}"))
        ] == []
        chat.context.close()


@pytest.fixture
def chat(make_chat) -> Chat:
    return make_chat()
