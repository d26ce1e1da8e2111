"""Accessibility of the chat page: phones, dark theme, keyboard, screen readers, reduced motion."""

from __future__ import annotations

import pytest

from tests.benchmarks.test_report_browser import SIZES, TEXTS
from tests.page.live import until


@pytest.mark.parametrize(
    ("size", "scheme"),
    [
        ("phone", "dark"),
        ("desktop", "light"),
        pytest.param("phone", "light", marks=pytest.mark.slow),
        pytest.param("desktop", "dark", marks=pytest.mark.slow),
    ],
)
def test_readable_in_both_themes_on_phone_and_desktop(make_chat, size, scheme):
    """No horizontal scrolling, and sufficient text size and contrast, in every state of the page."""
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


def test_keyboard_operation_with_visible_focus(chat, server):
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


def test_screen_reader_output(chat, server):
    """Landmarks and accessible names. An answer is announced in sentences, not token by token."""
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


def test_reduced_motion(make_chat):
    chat = make_chat(reduced_motion="reduce")
    chat.send("HELD")
    chat.wait_text("The first words.")
    moving = "document.getAnimations().length"
    assert chat.page.evaluate(moving) == 0
    chat.field.press("Escape")
    chat.done()
