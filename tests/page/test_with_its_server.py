"""The chat page and its server: settings, API key, refusals, a server crash, static files."""

from __future__ import annotations

import re
from types import SimpleNamespace

from tests.page.chat import SCRIPTS
from tests.page.live import live_server, until


def test_settings_are_sent_and_saved(chat, server):
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


def test_the_api_key_is_requested_once(make_chat):
    with live_server(SCRIPTS, keys=("secret",)) as locked:
        chat = make_chat(locked, refusals=True)
        dialog = chat.page.get_by_role("dialog", name="API key")
        dialog.get_by_role("button", name="Close").click()
        chat.send("SHORT")
        dialog.get_by_label("This server requires an API key").fill("wrong")
        dialog.get_by_role("button", name="Use this key").click()
        chat.page.locator("#key-dialog[open] #key").wait_for()
        dialog.get_by_label("This server requires an API key").fill("secret")
        dialog.get_by_role("button", name="Use this key").click()
        chat.wait_text("Short answer.")
        assert chat.answers.count() == 1
        chat.page.reload()
        chat.wait_text("Short answer.")
        chat.page.locator("#status-model").get_by_text("tiny-starchat").wait_for()
        assert not dialog.is_visible()
        kept = chat.page.evaluate("JSON.stringify(localStorage)")
        assert "secret" not in kept and "wrong" not in kept


def test_a_full_queue_and_a_closing_server_are_explained(make_chat):
    with live_server(SCRIPTS, queue_limit=1) as busy:
        chat = make_chat(busy, refusals=True)
        chat.send("HELD one")
        chat.wait_text("The first words.")
        chat.button("New conversation").first.click()
        chat.send("SHORT two")
        until(lambda: busy.worker.waiting == 1)
        chat.button("New conversation").first.click()
        chat.send("SHORT three")
        chat.page.get_by_text("The server is busy with other requests.").first.wait_for()
        busy.session.go.release()
        until(lambda: not busy.worker.busy and not busy.worker.waiting)
        chat.last.get_by_role("button", name="Try again").last.click()
        chat.wait_text("Short answer.")
        assert chat.last.locator(".version").count() == 0  # a refusal is not a version of the answer
        busy.worker.close()
        chat.send("SHORT four")
        chat.page.get_by_text("The server accepts no requests at the moment.").first.wait_for()


def test_a_server_crash_and_restart(make_chat):
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
        # The request includes the question and its partial answer.
        assert [m["content"] for m in chat.bodies[-1]["messages"]] == ["HELD", "The first words. ", "SHORT"]


def test_plan_speed_and_memory_are_shown(chat):
    chat.ask("SHORT")
    status = chat.page.locator("#status")
    status.get_by_text("tokens/s").wait_for()
    shown = status.text_content()
    assert "tiny-starchat" in shown and re.search(r"\d+ MiB", shown) and "100.0 tokens/s" in shown
    status.click()
    dialog = chat.page.get_by_role("dialog", name="About this server")
    assert "bfloat16 is the best version here" in dialog.text_content()
    assert "1,024 tokens" in dialog.text_content()
    assert "one at a time" in dialog.text_content()


def test_static_files_are_cached_and_revalidated(browser, server):
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


def test_rendering_beyond_its_limits_is_refused(browser, server):
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
