"""Conversations on the chat page: versions, the list of conversations, files and browser storage."""

from __future__ import annotations

import json
from pathlib import Path

from tests.page.live import until


def test_regenerating_keeps_the_first_answer(chat):
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
    """Arrow-up edits the last question and Enter sends it. The earlier branch remains as a version."""
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


def test_two_conversations_can_be_reopened(chat):
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
    # A second tab has the same conversations and follows changes in the first.
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


def test_saving_conversations_to_files(chat):
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


def test_a_draft_and_a_partial_answer_survive_a_reload(chat, server):
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


def test_an_answer_continues_while_another_conversation_is_open(chat, server):
    chat.send("HELD")
    chat.wait_text("The first words.")
    chat.button("New conversation").first.click()
    assert chat.page.get_by_role("img", name="Answering").count() == 1
    assert chat.page.locator("#send.is-stop").count() == 0
    server.session.go.release()
    chat.page.get_by_role("img", name="Answering").wait_for(state="detached")
    chat.page.get_by_role("link", name="HELD").click()
    chat.wait_text("And the rest.")


def test_old_questions_are_left_out_to_fit_the_context(chat, server):
    """A long conversation continues, although the server would refuse it as a whole."""
    for number in range(4):
        chat.ask(f"SHORT {number} " + "word " * 300)
    assert server.session.loaded is not None
    assert len(chat.bodies[-1]["messages"]) < 7
    assert chat.bodies[-1]["messages"][-1]["content"].startswith("SHORT 3")
    assert "did not fit the context" in chat.last.locator(".note").text_content()
    assert chat.last.locator(".prose").text_content() == "Short answer."


def test_full_storage_is_reported_and_the_chat_continues(chat):
    chat.page.evaluate(
        """() => {
          for (let n = 1 << 22; n; n >>= 1) try { localStorage.setItem('x' + n, 'x'.repeat(n)) } catch {}
        }"""
    )
    answer = chat.ask("SHORT " + "x" * 2000)
    assert answer.locator(".prose").text_content() == "Short answer."
    assert chat.page.get_by_text("The browser cannot save conversations").is_visible()


def test_invalid_stored_values_are_ignored(chat):
    """Stored values may come from another version of the page or from a person."""
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
