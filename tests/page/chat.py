"""Helpers that use the chat page as a person would, and the answers of the scripted model."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.page.live import HOLD, LiveServer

CODE = """Here is **one** way:

```python
def add(a: int, b: int) -> int:
    # all of it
    return a + b
```

And [why](https://example.org/why).
"""
HOSTILE = """<script>window.pwned = 1</script>

<img src=x onerror="window.pwned = 2"> and <b>bold</b>

[click](javascript:window.pwned=3) and [data](data:text/html,<script>1</script>)

```html
<script>window.pwned = 4</script>
```
"""
SCRIPTS = {
    "SHORT": ["Short", " answer", "."],
    "CODE": list(re.findall(r"\s*\S{1,4}|\s+$", CODE)),
    "HOSTILE": [HOSTILE[:30], HOSTILE[30:]],
    "HELD": ["The first ", "words. ", HOLD, "And ", "the ", "rest."],
    "SLOWLY": ["**And** ", "so ", HOLD, "it ", "goes ", "on ", HOLD, "and ", HOLD, "**on**", "."],
    "SLOW": ["```python\n", "x = 1\n", HOLD, "y = 2\n", HOLD, "z = 3\n```", "\n\nDone."],
    "LONG": [f"line {i}\n\n" for i in range(60)] + [HOLD] + [f"more {i}\n\n" for i in range(20)],
    "EMPTY": [""],
}


class Chat:
    """The chat page, operated through its visible controls."""

    def __init__(self, context: Any, server: LiveServer) -> None:
        self.context, self.server, self.refusals = context, server, False
        self.page = context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.watch(self.page)
        self.page.goto(server.url)

    def watch(self, page: Any) -> None:
        page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        page.on("request", self._asked)

    def _asked(self, request: Any) -> None:
        self.asked.append(request.url)
        if request.url.endswith("/v1/chat/completions"):
            self.bodies.append(json.loads(request.post_data))

    @property
    def field(self) -> Any:
        return self.page.get_by_label("Your question")

    @property
    def answers(self) -> Any:
        return self.page.locator("article.answer")

    @property
    def last(self) -> Any:
        return self.answers.last

    def button(self, name: str, **options: Any) -> Any:
        return self.page.get_by_role("button", name=name, exact=True, **options)

    def send(self, question: str) -> None:
        self.field.fill(question)
        self.field.press("Enter")

    def ask(self, question: str) -> Any:
        """Send the question and wait for the complete answer."""
        self.send(question)
        self.done()
        return self.last

    def done(self) -> None:
        self.page.locator("#send:not(.is-stop)").wait_for()
        self.page.locator("article.answer:not([aria-busy=false])").wait_for(state="detached")

    def wait_text(self, text: str) -> None:
        self.last.get_by_text(text).first.wait_for()

    def titles(self) -> list[str]:
        return self.page.locator("#conversations .title").all_text_contents()

    def settings(self, **values: str) -> None:
        """Fill in the settings, named by their labels."""
        self.button("Settings").last.click()
        dialog = self.page.get_by_role("dialog", name="Settings")
        for label, value in values.items():
            dialog.get_by_label(label.replace("_", " "), exact=True).fill(value)
        dialog.get_by_role("button", name="Done").click()
        dialog.wait_for(state="hidden")
