"""The chat page in a real browser, on a live server: what people do with it, and what must never happen."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.page_helpers import HOLD, LiveServer, live_server, until
from tests.test_bench_report_browser import SIZES, TEXTS

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


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(SCRIPTS) as running:
        yield running


class Chat:
    """The page as a person sees it."""

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
        """Send, and wait for the answer in its final form."""
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
        """Fill in fields of the settings by their labels."""
        self.button("Settings").last.click()
        dialog = self.page.get_by_role("dialog", name="Settings")
        for label, value in values.items():
            dialog.get_by_label(label.replace("_", " "), exact=True).fill(value)
        dialog.get_by_role("button", name="Done").click()
        dialog.wait_for(state="hidden")


@pytest.fixture
def make_chat(browser, server) -> Iterator[Any]:
    """Pages in contexts of their own. None may have said anything in its console, or asked another server."""
    made: list[Chat] = []

    def make(on: LiveServer = server, *, refusals: bool = False, **options: Any) -> Chat:
        options = {"viewport": {"width": 1280, "height": 800}, **options}
        context = browser.new_context(**options)
        context.set_default_timeout(60_000)  # a busy machine is no fault of the page
        made.append(Chat(context, on))
        made[-1].refusals = refusals
        return made[-1]

    yield make
    while server.session.go.acquire(blocking=False):
        pass
    for chat in made:
        said = chat.said
        if chat.refusals:  # the browser's own lines on them
            said = [line for line in said if "Failed to load resource" not in line]
        assert said == []
        assert [
            url for url in chat.asked if not url.startswith((chat.server.url, f"blob:{chat.server.url}"))
        ] == []
        chat.context.close()


@pytest.fixture
def chat(make_chat) -> Chat:
    return make_chat()


def test_a_question_is_answered_by_the_model_itself(chat, server):
    """The embedded model, greedily: the page shows what it says, its figures, and why it ended."""
    chat.settings(Temperature="0", Max_tokens="12")
    answer = chat.ask("Write a Python function that adds two numbers")
    assert answer.locator(".code .language").text_content() == "Python"
    assert "def " in answer.locator("pre").text_content()
    assert re.match(r"12 tokens[\d., ·]+tokens/s", answer.locator(".figures").text_content())
    assert "Cut at 12 tokens" in answer.locator(".note").text_content()
    assert chat.field.input_value() == ""
    assert chat.page.locator("#title").text_content() == "Write a Python function that adds two numbers"
    # Asked once more without the page, the model says the same.
    body = {name: value for name, value in chat.bodies[0].items() if not name.startswith("stream")}
    whole = chat.context.request.post(f"{server.url}v1/chat/completions", data=body)
    said = whole.json()["choices"][0]["message"]["content"]
    stored = chat.page.evaluate("Object.entries(localStorage).find(([k]) => k.startsWith('lowmem.chat.'))[1]")
    assert json.loads(stored)["turns"][1]["text"] == said


def test_it_streams_and_stops(chat, server):
    """What came is there before the rest is; stop keeps it, and the server's generation really ends."""
    chat.send("HELD")
    chat.wait_text("The first words.")
    assert chat.last.get_attribute("data-state") == "streaming"
    assert server.worker.busy
    chat.field.press("Escape")
    chat.done()
    assert chat.last.locator(".prose").text_content() == "The first words."
    assert chat.last.locator(".note").text_content() == "Stopped."
    until(lambda: not server.worker.busy)
    assert chat.field.evaluate("e => e === document.activeElement")


def test_stop_by_its_button(chat, server):
    chat.send("HELD")
    chat.wait_text("The first words.")
    chat.button("Stop").click()
    chat.done()
    assert chat.last.get_attribute("data-state") == "stopped"
    until(lambda: not server.worker.busy)
    assert chat.button("Send").is_disabled()


def test_code_blocks_have_colours_a_label_and_a_copy_button(chat):
    chat.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer = chat.ask("CODE")
    assert answer.locator(".prose > p > strong").text_content() == "one"
    block = answer.get_by_role("group", name="Code: Python")
    assert block.locator(".code-keyword").all_text_contents()[0].strip() == "def"
    assert block.locator(".code-comment").text_content().strip() == "# all of it"
    code = "def add(a: int, b: int) -> int:\n    # all of it\n    return a + b"
    assert block.locator("code").text_content() == code
    block.get_by_role("button", name="Copy the code").click()
    block.get_by_text("Copied").wait_for()
    assert chat.page.evaluate("navigator.clipboard.readText()") == code
    link = answer.get_by_role("link", name="why")
    assert link.get_attribute("href") == "https://example.org/why"
    assert link.get_attribute("rel") == "noopener noreferrer nofollow"


def test_a_growing_code_block_stays_the_same_element(chat, server):
    """So that a selection, a focused button and a scrolled block outlive the answer's growth: no flicker."""
    chat.send("SLOW")
    chat.wait_text("x = 1")
    chat.page.locator(".code").evaluate("e => { e.mark = 1 }")
    chat.button("Copy the code").focus()
    server.session.go.release()
    chat.wait_text("y = 2")
    server.session.go.release()
    chat.done()
    chat.wait_text("Done.")
    assert chat.page.locator(".code").evaluate("e => e.mark") == 1
    assert chat.page.locator(".code code").text_content() == "x = 1\ny = 2\nz = 3"
    assert chat.button("Copy the code").evaluate("e => e === document.activeElement")


def test_letters_do_not_wait_for_the_renderer_which_has_one_text_at_a_time(chat, server):
    held: list[Any] = []
    calls = 0

    def slow(route: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            route.continue_()
        else:
            held.append(route)

    chat.page.route("**/page/render", slow)
    chat.send("SLOWLY")
    prose = chat.last.locator(".prose")
    prose.locator("strong").wait_for()
    server.session.go.release()
    prose.get_by_text("so it goes on").wait_for()
    until_page(chat.page, lambda: held)
    server.session.go.release()
    prose.get_by_text("so it goes on and").wait_for()
    chat.page.wait_for_timeout(100)
    assert len(held) == 1
    server.session.go.release()
    until_page(chat.page, lambda: chat.last.get_attribute("data-state") == "done")
    assert len(held) == 1
    held.pop().continue_()
    until_page(chat.page, lambda: held)
    held.pop().continue_()
    chat.done()
    assert prose.locator("strong").all_text_contents() == ["And", "on"]
    assert prose.text_content() == "And so it goes on and on."


def until_page(page: Any, condition: Any) -> None:
    """Wait, and let the browser's events come in meanwhile."""
    for _ in range(600):
        if condition():
            return
        page.wait_for_timeout(100)
    raise AssertionError("it never came true")


def test_the_models_output_is_never_html(chat):
    answer = chat.ask("HOSTILE")
    text = answer.locator(".prose").text_content()
    for shown in (
        "<script>window.pwned = 1</script>",
        '<img src=x onerror="window.pwned = 2"> and <b>bold</b>',
        "[click](javascript:window.pwned=3)",
        "<script>window.pwned = 4</script>",
    ):
        assert shown in text
    assert answer.locator(".prose :is(script, img, b, a, iframe, style)").count() == 0
    chat.page.reload()
    chat.last.get_by_text("window.pwned = 4").first.wait_for()
    assert chat.page.evaluate("window.pwned") is None


def test_a_tree_that_says_what_it_must_not_is_shown_as_text(chat):
    """The page trusts not even its own server's tree: it checks each value that becomes an attribute."""
    tree = [
        ["script", "", ["window.pwned = 1"]],
        [
            "paragraph",
            "onclick=x",
            [["link", "javascript:window.pwned=2", ["click"]], ["link", "no address", ["x"]]],
        ],
        ["heading", "9", ["title"]],
        ["table", "", [["body", "", [["row", "", [["cell", "expression(1)", ["cell"]]]]]]]],
        ["block", "<b>label</b>", [["span", "x onload=y", ["<i>code</i>"]]]],
        ["constructor", "", ["odd"]],
    ]
    chat.page.route(
        "**/page/render",
        lambda route: route.fulfill(json={"blocks": tree, "settled": 0, "settled_blocks": 0}),
    )
    answer = chat.ask("SHORT")
    answer.get_by_text("odd").wait_for()
    assert answer.locator(".prose :is(script, a, b, i)").count() == 0
    chat.page.get_by_text("click").click()
    assert chat.page.evaluate("window.pwned") is None
    html = answer.locator(".prose").evaluate("e => e.outerHTML")
    assert not re.search(r"onclick|onload|expression|javascript:", html)
    assert "&lt;b&gt;label&lt;/b&gt;" in html and "&lt;i&gt;code&lt;/i&gt;" in html


def test_without_the_renderer_the_letters_are_shown_as_they_came(make_chat):
    chat = make_chat(refusals=True)
    chat.page.route("**/page/render", lambda route: route.fulfill(status=500, body="no"))
    answer = chat.ask("CODE")
    assert answer.locator(".prose").text_content() == CODE
    assert chat.page.locator(".code").count() == 0


def test_trying_again_keeps_the_first_answer(chat):
    chat.ask("SHORT")
    chat.last.get_by_role("button", name="Try again").click()
    chat.done()
    assert chat.answers.count() == 1
    assert chat.last.locator(".version").text_content() == "2 / 2"
    earlier = chat.button("Earlier version of the answer")
    earlier.focus()
    earlier.press("Enter")
    assert chat.last.locator(".version").text_content() == "1 / 2"
    assert chat.button("Later version of the answer").evaluate("e => e === document.activeElement")
    assert chat.bodies[0]["messages"] == chat.bodies[1]["messages"]
    assert chat.field.input_value() == ""


def test_editing_a_question_branches_the_conversation(chat):
    """The arrow opens the last question, Enter sends it; what was said before is a version away."""
    chat.ask("SHORT one")
    chat.ask("SHORT two")
    chat.field.press("ArrowUp")
    field = chat.page.get_by_role("textbox", name="Edit the question")
    assert field.input_value() == "SHORT two"
    field.press("Escape")
    assert chat.answers.count() == 2 and len(chat.bodies) == 2
    assert chat.field.evaluate("e => e === document.activeElement")
    first = chat.page.locator("article.question").first
    first.hover()
    first.get_by_role("button", name="Edit the question").click()
    field.fill("SHORT three")
    field.press("Enter")
    chat.done()
    assert chat.answers.count() == 1
    assert [m["content"] for m in chat.bodies[-1]["messages"]] == ["SHORT three"]
    first.get_by_role("button", name="Earlier version of the question").click()
    assert chat.page.locator(".bubble").all_text_contents() == ["SHORT one", "SHORT two"]
    chat.page.reload()
    chat.page.get_by_text("SHORT two", exact=True).wait_for()
    chat.ask("SHORT four")
    assert [m["content"] for m in chat.bodies[-1]["messages"]] == [
        "SHORT one",
        "Short answer.",
        "SHORT two",
        "Short answer.",
        "SHORT four",
    ]


def test_two_conversations_are_found_again(chat):
    chat.ask("SHORT about apples")
    chat.button("New conversation").first.click()
    chat.ask("CODE about pears")
    assert chat.titles() == ["CODE about pears", "SHORT about apples"]
    assert [m["content"] for m in chat.bodies[-1]["messages"]] == ["CODE about pears"]
    chat.page.reload()
    chat.page.get_by_role("group", name="Code: Python").wait_for()
    assert chat.page.locator("#title").text_content() == "CODE about pears"
    chat.page.get_by_role("link", name="SHORT about apples").click()
    chat.wait_text("Short answer.")
    assert chat.answers.count() == 1
    assert chat.page.get_by_role("link", name="SHORT about apples").get_attribute("aria-current") == "page"
    chat.page.go_back()
    chat.page.get_by_role("group", name="Code: Python").wait_for()
    # A second tab has the same conversations, and sees what is done in the first.
    other = chat.context.new_page()
    chat.watch(other)
    other.goto(chat.server.url)
    other.get_by_role("link", name="SHORT about apples").click()
    chat.ask("SHORT more pears")
    other.get_by_role("link", name="CODE about pears").click()
    other.get_by_text("SHORT more pears").wait_for()


def test_renaming_deleting_and_undoing(chat):
    chat.ask("SHORT apples")
    chat.button("New conversation").first.click()
    chat.ask("SHORT pears")
    chat.button("Rename “SHORT pears”").click()
    field = chat.page.get_by_label("Title of the conversation")
    field.fill("My pears")
    field.press("Enter")
    assert chat.titles() == ["My pears", "SHORT apples"]
    assert chat.page.title() == "My pears – lowmem"
    chat.button("Delete “My pears”").click()
    assert chat.titles() == ["SHORT apples"]
    assert chat.page.get_by_role("heading", name="What shall we work on?").is_visible()
    chat.button("Undo").click()
    assert chat.titles() == ["My pears", "SHORT apples"]
    chat.wait_text("Short answer.")
    chat.page.reload()
    chat.wait_text("Short answer.")
    assert chat.titles() == ["My pears", "SHORT apples"]
    chat.button("Settings").last.click()
    with chat.page.expect_download() as download:
        chat.button("Save all to a file").click()
    chat.button("Delete all").click()
    assert chat.titles() == []
    assert chat.page.evaluate("Object.keys(localStorage).filter(k => k.startsWith('lowmem.chat.'))") == []

    chat.page.get_by_label("File of conversations").set_input_files(download.value.path())
    chat.page.get_by_text("Conversations added: 2.").wait_for()
    assert chat.titles() == ["My pears", "SHORT apples"]


def test_conversations_as_files(chat):
    chat.ask("SHORT: apples / pears?")
    chat.button("Export").click()
    with chat.page.expect_download() as download:
        chat.button("Save as Markdown").click()
    assert download.value.suggested_filename == "SHORT-apples-pears.md"
    text = Path(download.value.path()).read_text(encoding="utf-8")
    assert (
        text
        == "# SHORT: apples / pears?\n\n## Question\n\nSHORT: apples / pears?\n\n## Answer\n\nShort answer.\n"
    )
    chat.button("Export").click()
    with chat.page.expect_download() as download:
        chat.button("Save as JSON").click()
    record = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert [turn["text"] for turn in record["turns"]] == ["SHORT: apples / pears?", "Short answer."]


def test_a_draft_and_a_half_answer_survive_a_reload(chat, server):
    chat.send("HELD")
    chat.wait_text("The first words.")
    chat.field.fill("a draft of\ntwo lines")
    chat.page.reload()
    chat.wait_text("The first words.")
    assert chat.field.input_value() == "a draft of\ntwo lines"
    assert "Interrupted" in chat.last.locator(".note").text_content()
    until(lambda: not server.worker.busy)
    chat.field.fill("")
    chat.last.get_by_role("button", name="Try again").click()
    server.session.go.release()
    chat.done()
    assert chat.last.locator(".prose").text_content() == "The first words. And the rest."


def test_an_answer_goes_on_while_another_conversation_is_read(chat, server):
    chat.send("HELD")
    chat.wait_text("The first words.")
    chat.button("New conversation").first.click()
    assert chat.page.get_by_role("img", name="Answering").count() == 1
    assert chat.page.locator("#send.is-stop").count() == 0
    server.session.go.release()
    chat.page.get_by_role("img", name="Answering").wait_for(state="detached")
    chat.page.get_by_role("link", name="HELD").click()
    chat.wait_text("And the rest.")


def test_settings_are_in_the_request_and_are_kept(chat, server):
    chat.settings(
        System_text="Be brief.",
        Temperature="0.7",
        Top_p="0.5",
        Max_tokens="2",
        Seed="11",
        Stop_texts="END\n\\n\\n",
    )
    chat.ask("SHORT")
    assert {
        k: chat.bodies[0][k] for k in ("temperature", "top_p", "max_tokens", "seed", "stop", "messages")
    } == {
        "temperature": 0.7,
        "top_p": 0.5,
        "max_tokens": 2,
        "seed": 11,
        "stop": ["END", "\n\n"],
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "SHORT"}],
    }
    used = server.session.params[-1]
    assert (used.temperature, used.top_p, used.max_new_tokens, used.seed) == (0.7, 0.5, 2, 11)
    assert "Be brief." in server.session.prompts[-1]
    assert chat.last.locator(".note").text_content().startswith("Cut at 2 tokens")
    chat.page.reload()
    chat.button("Settings").last.click()
    dialog = chat.page.get_by_role("dialog", name="Settings")
    assert dialog.get_by_label("Temperature").input_value() == "0.7"
    assert dialog.get_by_label("Stop texts").input_value() == "END\n\\n\\n"
    dialog.get_by_label("Temperature").fill("3")
    assert dialog.get_by_text("A number from 0 to 2.").is_visible()
    dialog.get_by_role("button", name="Done").click()
    assert dialog.is_visible()
    dialog.get_by_role("button", name="Reset to defaults").click()
    assert dialog.get_by_label("Temperature").input_value() == "0.2"
    dialog.get_by_role("button", name="Done").click()
    chat.ask("SHORT")
    assert chat.bodies[-1]["temperature"] == 0.2 and "seed" not in chat.bodies[-1]
    assert [m["role"] for m in chat.bodies[-1]["messages"]] == ["user", "assistant", "user"]


def test_the_key_is_asked_for_once(make_chat):
    with live_server(SCRIPTS, keys=("secret",)) as locked:
        chat = make_chat(locked, refusals=True)
        dialog = chat.page.get_by_role("dialog", name="API key")
        dialog.get_by_role("button", name="Close").click()
        chat.send("SHORT")
        dialog.get_by_label("This server asks for its API key").fill("wrong")
        dialog.get_by_role("button", name="Use this key").click()
        chat.page.locator("#key-dialog[open] #key").wait_for()
        dialog.get_by_label("This server asks for its API key").fill("secret")
        dialog.get_by_role("button", name="Use this key").click()
        chat.wait_text("Short answer.")
        assert chat.answers.count() == 1
        chat.page.reload()
        chat.wait_text("Short answer.")
        chat.page.locator("#status-model").get_by_text("tiny-starchat").wait_for()
        assert not dialog.is_visible()
        kept = chat.page.evaluate("JSON.stringify(localStorage)")
        assert "secret" not in kept and "wrong" not in kept


def test_a_full_queue_and_a_closing_server_are_said_in_words(make_chat):
    with live_server(SCRIPTS, queue_limit=1) as busy:
        chat = make_chat(busy, refusals=True)
        chat.send("HELD one")
        chat.wait_text("The first words.")
        chat.button("New conversation").first.click()
        chat.send("SHORT two")
        until(lambda: busy.worker.waiting == 1)
        chat.button("New conversation").first.click()
        chat.send("SHORT three")
        chat.page.get_by_text("The server is busy with other questions.").first.wait_for()
        busy.session.go.release()
        until(lambda: not busy.worker.busy and not busy.worker.waiting)
        chat.last.get_by_role("button", name="Try again").last.click()
        chat.wait_text("Short answer.")
        assert chat.last.locator(".version").count() == 0  # the refusal is no version of an answer
        busy.worker.close()
        chat.send("SHORT four")
        chat.page.get_by_text("The server takes no questions at the moment.").first.wait_for()


def test_a_server_that_dies_and_comes_back(make_chat):
    with live_server(SCRIPTS) as dying:
        chat = make_chat(dying, refusals=True)
        chat.send("HELD")
        chat.wait_text("The first words.")
        dying.cut_off()
        chat.page.get_by_text(
            "The connection was lost before the answer was complete. What came is kept."
        ).wait_for()
        chat.done()
        assert chat.last.locator(".prose").text_content() == "The first words."
        dying.stop()
        chat.send("SHORT")
        chat.page.get_by_text("The server cannot be reached. Is lowmem serve still running?").first.wait_for()
        dying.restart()
        chat.last.get_by_role("button", name="Try again").last.click()
        chat.wait_text("Short answer.")
        # The question that has half an answer is part of what is asked.
        assert [m["content"] for m in chat.bodies[-1]["messages"]] == ["HELD", "The first words. ", "SHORT"]


def test_old_questions_are_left_out_to_fit_the_context(chat, server):
    """A long conversation goes on: the server would refuse it whole."""
    for number in range(4):
        chat.ask(f"SHORT {number} " + "word " * 300)
    assert server.session.loaded is not None
    assert len(chat.bodies[-1]["messages"]) < 7
    assert chat.bodies[-1]["messages"][-1]["content"].startswith("SHORT 3")
    assert "to fit the context" in chat.last.locator(".note").text_content()
    assert chat.last.locator(".prose").text_content() == "Short answer."


def test_it_follows_an_answer_only_from_its_end(chat, server):
    chat.send("LONG")
    chat.wait_text("line 59")
    scroller = chat.page.locator("#scroller")
    gap = "e => e.scrollHeight - e.scrollTop - e.clientHeight"
    until(lambda: scroller.evaluate(gap) < 2)
    scroller.evaluate("e => { e.scrollTop = 100 }")
    jump = chat.button("Go to the end")
    jump.wait_for()
    server.session.go.release()
    chat.done()
    chat.wait_text("more 19")
    assert scroller.evaluate("e => e.scrollTop") == 100
    jump.click()
    until(lambda: scroller.evaluate(gap) < 2)
    assert jump.is_hidden()


def test_plan_speed_and_memory_are_shown(chat):
    chat.ask("SHORT")
    status = chat.page.locator("#status")
    status.get_by_text("tokens/s").wait_for()
    shown = status.text_content()
    assert "tiny-starchat" in shown and re.search(r"\d+ MiB", shown) and "100.0 tokens/s" in shown
    status.click()
    dialog = chat.page.get_by_role("dialog", name="What runs here")
    assert "bfloat16 is the best form here" in dialog.text_content()
    assert "1,024 tokens" in dialog.text_content()


@pytest.mark.parametrize(
    ("size", "scheme"),
    [
        ("phone", "dark"),
        ("desktop", "light"),
        pytest.param("phone", "light", marks=pytest.mark.slow),
        pytest.param("desktop", "dark", marks=pytest.mark.slow),
    ],
)
def test_it_is_readable_in_both_themes_on_phone_and_desktop(make_chat, size, scheme):
    """No sideways scrolling, and letters large and strong enough, in every state of the page."""
    width, height = SIZES[size]
    chat = make_chat(
        viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=size == "phone"
    )
    page = chat.page

    def check() -> None:
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width
        assert page.evaluate("document.querySelector('#scroller').scrollWidth") <= width
        seen = page.evaluate(TEXTS)
        assert len(seen) > 8
        assert [text for text in seen if text["contrast"] < 4.5] == []
        assert [text for text in seen if text["pixels"] < 11.99] == []

    check()
    chat.ask("CODE " + "averyverylongword" * 12)
    check()
    chat.ask("HOSTILE")
    check()
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) > 600) == (scheme == "light")
    if size == "phone":
        assert page.locator("#sidebar").evaluate("e => e.inert")
        chat.button("Show conversations").click()
        until(lambda: page.locator("#sidebar").evaluate("e => e.getBoundingClientRect().left") == 0)
        assert chat.button("Close the list").evaluate("e => e === document.activeElement")
        check()
        page.keyboard.press("Escape")
        assert chat.button("Show conversations").evaluate("e => e === document.activeElement")
    chat.button("Settings").last.click()
    check()
    box = page.get_by_role("dialog", name="Settings").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= height
    page.keyboard.press("Escape")
    assert page.get_by_role("dialog", name="Settings").is_hidden()


def test_a_chosen_theme_is_remembered(chat):
    dark = "getComputedStyle(document.documentElement).colorScheme"
    assert chat.page.evaluate(dark) == "light"
    chat.button("Dark theme").click()
    assert chat.page.evaluate(dark) == "dark"
    chat.page.reload()
    assert chat.page.evaluate(dark) == "dark"
    chat.button("Settings").last.click()
    assert chat.page.get_by_label("Dark", exact=True).is_checked()
    chat.page.get_by_label("As the system").check(force=True)
    assert chat.page.evaluate(dark) == "light"


def test_everything_by_keyboard_with_the_focus_in_sight(chat, server):
    page = chat.page
    page.keyboard.type("HELD")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    page.keyboard.press("Enter")
    chat.wait_text("The first words.")
    assert chat.page.locator(".bubble").text_content() == "HELD\nsecond line"
    page.keyboard.press("Escape")
    chat.done()
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        name = page.evaluate(
            "document.activeElement.getAttribute('aria-label') || document.activeElement.textContent"
        )
        if page.evaluate("document.activeElement === document.body"):
            continue
        reached.append(name.strip())
        if page.evaluate("!document.activeElement.matches('textarea, input')"):
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", name
            assert page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2, (
                name
            )
    for name in ("New conversation", "Settings", "Export", "Dark theme", "Edit the question", "Try again"):
        assert name in reached
    page.keyboard.press("Control+/")
    assert page.get_by_role("dialog", name="Keyboard").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("Control+Shift+O")
    assert page.get_by_role("heading", name="What shall we work on?").is_visible()
    assert chat.field.evaluate("e => e === document.activeElement")


def test_who_cannot_see_it_hears_it(chat, server):
    """Landmarks and names; an answer is read in sentences, and not letter by letter."""
    chat.send("HELD")
    chat.wait_text("The first words.")
    log = chat.page.locator("#announcements")
    assert log.get_attribute("aria-live") == "polite"
    log.get_by_text("The first words.").wait_for(state="attached")
    server.session.go.release()
    chat.done()
    assert log.locator("p").all_text_contents() == [
        "The question was sent.",
        "The first words.",
        "And the rest.",
        "The answer is complete.",
    ]
    tree = chat.page.locator("body").aria_snapshot()
    for line in (
        '- navigation "Conversations"',
        '- button "New conversation"',
        '- link "HELD"',
        '- button "Rename “HELD”"',
        '- heading "HELD" [level=1]',
        '- main "Messages"',
        '- article "Question 1"',
        '- article "Answer 1"',
        '- heading "Answer 1" [level=2]',
        '- button "Try again"',
        '- textbox "Your question"',
        '- button "Send" [disabled]',
        '- log "Answer"',
    ):
        assert line in tree, tree
    unnamed = """() => [...document.querySelectorAll('button, a, input, textarea, [role=img]')]
      .filter(e => !e.computedName && !(e.ariaLabel || e.textContent.trim() || e.labels?.length || e.title))
      .map(e => e.outerHTML)"""
    assert chat.page.evaluate(unnamed) == []


def test_less_motion(make_chat):
    chat = make_chat(reduced_motion="reduce")
    chat.send("HELD")
    chat.wait_text("The first words.")
    moving = "document.getAnimations().length"
    assert chat.page.evaluate(moving) == 0
    chat.field.press("Escape")
    chat.done()


def test_a_full_storage_is_said_and_costs_nothing_else(chat):
    chat.page.evaluate(
        """() => {
          for (let n = 1 << 22; n; n >>= 1) try { localStorage.setItem('x' + n, 'x'.repeat(n)) } catch {}
        }"""
    )
    answer = chat.ask("SHORT " + "x" * 2000)
    assert answer.locator(".prose").text_content() == "Short answer."
    assert chat.page.get_by_text("The browser keeps no more conversations").is_visible()


def test_what_the_storage_holds_may_be_anything(chat):
    """Another version of the page may have written it, or a person."""
    chat.page.evaluate(
        """() => {
          localStorage.setItem('lowmem.chat.a', '{"id": "a"}');
          localStorage.setItem('lowmem.chat.b', 'no JSON');
          localStorage.setItem('lowmem.settings', '{"temperature": "hot", "max_tokens": -1, "stop": ["E"]}');
          localStorage.setItem('lowmem.theme', 'purple');
        }"""
    )
    chat.page.reload()
    chat.ask("SHORT")
    assert chat.bodies[-1]["temperature"] == 0.2 and chat.bodies[-1]["max_tokens"] == 1024
    assert chat.bodies[-1]["stop"] == ["E"]
    assert chat.titles() == ["SHORT"]


def test_static_files_are_kept_by_browsers_and_asked_about(browser, server):
    request = browser.new_context().request
    first = request.get(server.url)
    assert first.headers["content-type"] == "text/html; charset=utf-8"
    assert first.headers["cache-control"] == "no-cache"
    assert "default-src 'none'" in first.headers["content-security-policy"]
    again = request.get(server.url, headers={"If-None-Match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status, again.body()) == (304, b"")
    types = SimpleNamespace(
        js="text/javascript; charset=utf-8", css="text/css; charset=utf-8", svg="image/svg+xml"
    )
    for name in ("app.js", "style.css", "icon.svg"):
        found = request.get(f"{server.url}page/{name}")
        assert found.headers["content-type"] == getattr(types, name.rpartition(".")[2])
    for name in ("index.html", "../app.py", "%2e%2e/app.py", "..%2fapp.py", "nothing.js", ""):
        assert request.get(f"{server.url}page/{name}").status == 404, name


def test_rendering_is_refused_past_its_limits(browser, server):
    request = browser.new_context().request
    for data, status in (
        ({"text": "x" * 200_001}, 400),
        ({"text": 1}, 400),
        ({}, 400),
        ({"text": "\ud800"}, 200),
    ):
        answer = request.post(f"{server.url}page/render", data=data)
        assert answer.status == status, answer.text()
        assert ("error" in answer.json()) == (status != 200)
