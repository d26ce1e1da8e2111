"""Answers on the chat page: streaming, stopping and rendering. Output of the model is never treated as
HTML."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.page.chat import CODE
from tests.page.live import until


def test_an_answer_of_the_embedded_model(chat, server):
    """The page shows the greedy answer of the embedded model, its figures and the reason for its end."""
    chat.settings(Temperature="0", Max_tokens="12")
    answer = chat.ask("Write a Python function that adds two numbers")
    assert answer.locator(".code .language").text_content() == "Python"
    assert "def " in answer.locator("pre").text_content()
    assert re.match(r"12 tokens[\d., ·]+tokens/s", answer.locator(".figures").text_content())
    assert "Cut at 12 tokens" in answer.locator(".note").text_content()
    assert chat.field.input_value() == ""
    assert chat.page.locator("#title").text_content() == "Write a Python function that adds two numbers"
    # Without the page, the model gives the same answer.
    body = {name: value for name, value in chat.bodies[0].items() if not name.startswith("stream")}
    whole = chat.context.request.post(f"{server.url}v1/chat/completions", data=body)
    said = whole.json()["choices"][0]["message"]["content"]
    stored = chat.page.evaluate("Object.entries(localStorage).find(([k]) => k.startsWith('lowmem.chat.'))[1]")
    assert json.loads(stored)["turns"][1]["text"] == said


def test_it_streams_and_stops(chat, server):
    """The first part is shown before the rest arrives. Stop keeps it and ends the generation on the
    server."""
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


def test_stop_button(chat, server):
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
    """The selection, a focused button and the scroll position survive while the answer grows."""
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


def test_text_appears_before_the_renderer_answers_and_one_render_runs_at_a_time(chat, server):
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
    """Wait, and let the browser process events meanwhile."""
    for _ in range(600):
        if condition():
            return
        page.wait_for_timeout(100)
    raise AssertionError("the condition did not become true")


def test_model_output_is_never_html(chat):
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


def test_an_invalid_tree_is_shown_as_text(chat):
    """The page does not trust the tree of its own server: it checks each value before it becomes an
    attribute."""
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


def test_without_the_renderer_plain_text_is_shown(make_chat):
    chat = make_chat(refusals=True)
    chat.page.route("**/page/render", lambda route: route.fulfill(status=500, body="no"))
    answer = chat.ask("CODE")
    assert answer.locator(".prose").text_content() == CODE
    assert chat.page.locator(".code").count() == 0


def test_the_page_follows_an_answer_only_when_scrolled_to_the_end(chat, server):
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


def test_scrolling_up_while_an_answer_streams_is_kept(chat, server):
    """The answer grows before the browser has sent the scroll event."""
    chat.page.add_init_script(
        """window.grown = [];
        window.ResizeObserver = class extends ResizeObserver {
          constructor(tell) { super(tell); window.grown.push(tell); }
        };"""
    )
    chat.page.reload()
    chat.send("LONG")
    chat.wait_text("line 59")
    scroller = chat.page.locator("#scroller")
    until(lambda: scroller.evaluate("e => e.scrollHeight - e.scrollTop - e.clientHeight") < 2)
    scroller.evaluate("e => { e.scrollTop = 100; window.grown.forEach((tell) => tell()); }")
    chat.button("Go to the end").wait_for()
    server.session.go.release()
    chat.done()
    chat.wait_text("more 19")
    assert scroller.evaluate("e => e.scrollTop") == 100
