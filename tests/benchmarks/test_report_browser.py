"""The HTML report in a real browser: no console output, no requests, readable at every size."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from lowmem.benchmarks.report.build import make_report
from lowmem.benchmarks.report.inputs import Records
from lowmem.benchmarks.report.page import to_html

from tests.benchmarks.bench_records import (
    FLOOR,
    FORMS,
    a_subject_latency,
    does_not_fit,
    humaneval_record,
    latency_record,
    quality_record,
)
from tests.benchmarks.report_helpers import extreme_report, hostile_report

SIZES = {"phone": (360, 740), "desktop": (1280, 800)}
SCHEMES = ("light", "dark")


def plain_records() -> Records:
    """Typical records: some versions fit, one does not."""
    subjects = [does_not_fit(FLOOR), *(a_subject_latency(form, seed=i) for i, form in enumerate(FORMS))]
    warning = "another program used the machine while this was measured"
    return Records(quality_record(), latency_record(subjects, [warning]), humaneval_record())


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    made = {}
    plain = make_report(plain_records(), "lowmem bench report")
    for name, report in (("plain", plain), ("hostile", hostile_report()), ("extreme", extreme_report())):
        made[name] = folder / f"{name}.html"
        made[name].write_text(to_html(report), encoding="utf-8")
    return made


@pytest.fixture(params=["plain", "hostile", "extreme"])
def file(request, pages) -> Path:
    return pages[request.param]


@pytest.fixture(params=SIZES)
def size(request) -> tuple[int, int]:
    return SIZES[request.param]


@pytest.fixture(params=SCHEMES)
def scheme(request) -> str:
    return request.param


@pytest.fixture
def opened(browser, file, size, scheme) -> Iterator[object]:
    """The opened page. It may not log to the console or send requests."""
    context = browser.new_context(
        viewport=dict(zip(("width", "height"), size, strict=True)), color_scheme=scheme
    )
    context.set_default_timeout(120_000)  # a busy machine must not fail the test
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    yield page
    page.mouse.wheel(0, 100_000)
    page.wait_for_timeout(50)
    assert said == []
    assert asked == [file.as_uri()]
    context.close()


def test_the_page_is_readable(opened, size, scheme):
    """No horizontal scrolling, sufficient text size and contrast, nothing cut off, nothing overlapping."""
    for all_open in (False, True):
        if all_open:
            opened.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
        root = "document.scrollingElement"
        assert opened.evaluate(f"{root}.scrollWidth") <= size[0]
        opened.evaluate(f"{root}.scrollTo(1000, 0)")
        assert opened.evaluate("scrollX") == 0
        seen = opened.evaluate(TEXTS)
        assert len(seen) > 50
        assert [t for t in seen if t["contrast"] < 4.5] == []
        assert [t for t in seen if t["pixels"] < 11.99] == []
    drawn = opened.evaluate(DRAWINGS)
    assert drawn
    shown = {"narrow", "wide"} - {"wide" if size == SIZES["phone"] else "narrow"}
    assert {d["kind"] for d in drawn} == shown
    assert [text for d in drawn for text in d["outside"]] == []
    assert [pair for d in drawn for pair in d["overlapping"]] == []
    assert [mark for d in drawn for mark in d["pale"]] == []
    background = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) > 600) == (scheme == "light")


def test_tables_are_reached_by_keyboard_with_visible_focus(browser, pages):
    page = browser.new_page()
    page.goto(pages["plain"].as_uri())
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break  # past the last one
        reached.add(page.evaluate("document.activeElement.className || document.activeElement.tagName"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2
    assert {"scroll", "A", "SUMMARY"} <= reached
    page.close()


def test_each_drawing_has_an_accessible_name(browser, pages):
    page = browser.new_page()
    page.goto(pages["plain"].as_uri())
    named = page.get_by_role("img").all()
    names = [one.evaluate("s => s.querySelector('title').textContent") for one in named]
    assert len(names) == 7 and len(set(names)) == 7
    assert page.get_by_role("img", name="Output quality against size").count() == 1
    assert page.get_by_role("table").count() >= 7
    assert page.evaluate("document.documentElement.lang") == "en"
    page.close()


def test_from_a_server_only_the_page_is_requested(browser, pages):
    """From a server, unlike from a file, a browser would also request an icon."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            asked.append(self.path)

    folder = pages["plain"].parent
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/plain.html")
        page.wait_for_timeout(200)
        page.close()
        server.shutdown()
        thread.join()
    assert asked == ["/plain.html"]


# Relative luminance and contrast as WCAG 2 defines them.
CONTRAST = """
const rgb = c => {
  const v = c.match(/[\\d.]+/g).map(Number);
  return {r: v[0], g: v[1], b: v[2], a: v[3] ?? 1};
};
const channel = c => { c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4 };
const light = c => 0.2126 * channel(c.r) + 0.7152 * channel(c.g) + 0.0722 * channel(c.b);
const ratio = (a, b) => {
  const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
  return (x + 0.05) / (y + 0.05);
};
const behind = e => {
  for (; e; e = e.parentElement) {
    const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.a > 0) return c;
  }
  return {r: 255, g: 255, b: 255, a: 1};
};
"""

# Contrast and size of every element that contains text.
TEXTS = f"""() => {{ {CONTRAST}
  const found = [];
  for (const e of document.body.querySelectorAll('*')) {{
    const own = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join('').trim();
    if (!own || ['STYLE', 'title', 'desc'].includes(e.tagName) || !e.getClientRects().length) continue;
    const style = getComputedStyle(e), svg = e.ownerSVGElement;
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    found.push({{
      text: own.slice(0, 40),
      contrast: ratio(rgb(svg ? style.fill : style.color), behind(e)),
      pixels: parseFloat(style.fontSize) * scale,
    }});
  }}
  return found;
}}"""

# Every visible drawing: text outside of it, overlapping text, and marks with too little contrast.
DRAWINGS = f"""() => {{ {CONTRAST}
  const found = [];
  for (const svg of document.querySelectorAll('svg')) {{
    const box = svg.getBoundingClientRect();
    if (!box.width) continue;
    const texts = [...svg.querySelectorAll('text')]
      .map(t => ({{t: t.textContent, b: t.getBoundingClientRect()}}));
    const outside = texts.filter(({{b}}) =>
      b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 || b.bottom > box.bottom + 1);
    const overlapping = [];
    texts.forEach((x, i) => texts.slice(i + 1).forEach(y => {{
      const wide = Math.min(x.b.right, y.b.right) - Math.max(x.b.left, y.b.left);
      const high = Math.min(x.b.bottom, y.b.bottom) - Math.max(x.b.top, y.b.top);
      if (wide > 1 && high > 5) overlapping.push([x.t, y.t]);  // a line box is taller than its letters
    }}));
    const pale = [...svg.querySelectorAll('use, path:not(defs *)')]
      .map(e => getComputedStyle(e).fill)
      .filter(fill => fill.startsWith('rgb') && ratio(rgb(fill), behind(svg)) < 3);
    const kind = svg.parentElement.className;
    found.push({{kind, outside: outside.map(o => o.t), overlapping, pale}});
  }}
  return found;
}}"""
