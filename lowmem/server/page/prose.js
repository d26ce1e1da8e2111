/**
 * An answer's text, shown while it grows. The server makes a tree of it, at most every MOST_OFTEN milliseconds and
 * one at a time; letters that came since stand behind it as they are, where they cannot change what is before them.
 */

import { renderMarkdown } from "./api.js";
import { contentOf, patch } from "./nodes.js";
import { element } from "./dom.js";

const MOST_OFTEN = 150;
const SHARE = 4; // rendering takes at most one part in so many of the time
const LINE_END = /\r\n?/g;
const QUIET = /^[\p{L}\p{N} ,.;?'"()/=+%&]*/u; // letters that mean nothing in markdown, inside of a line
const CODE = /^[^`~]*/; // those that cannot end a code block
const LINES = new Set(["paragraph", "heading", "item"]); // kinds that a line's letters go into
const GROUPS = new Set(["list", "numbered", "quotation", "item"]);

export class Prose {
  /** @param {() => void} onChange called after what is shown has changed */
  constructor(onChange) {
    this.root = element("div", { class: "prose" });
    this.onChange = onChange;
    this.text = "";
    /** Whether the server could not render what is shown now. */
    this.plain = false;
    /** @type {import("./nodes.js").Node[]} */
    this.nodes = [];
    this.start = 0; // of the text that is still rendered: what is before it has its final form
    this.settled = 0; // blocks of that text
    this.shown = ""; // the text that the nodes stand for
    /** @type {globalThis.Text|null} */
    this.tail = null;
    this.busy = false;
    this.finished = false;
    this.timer = 0;
    this.next = 0; // the time before which nothing is rendered
    /** @type {Promise<void>|null} */
    this.last = null;
  }

  /**
   * The answer so far.
   * @param {string} text
   */
  grow(text) {
    this.text = text.replace(LINE_END, "\n");
    this.#showTail();
    this.#schedule();
  }

  /**
   * The whole answer: rendered once from its beginning. Resolves when it is shown.
   * @param {string} text
   */
  async finish(text) {
    this.text = text.replace(LINE_END, "\n");
    this.#showTail();
    this.finished = true;
    clearTimeout(this.timer);
    await this.last;
    this.start = this.settled = 0;
    this.last = this.#render();
    await this.last;
  }

  #schedule() {
    if (this.finished || this.busy || this.timer || this.text.length === this.shown.length) return;
    this.timer = setTimeout(() => {
      this.timer = 0;
      this.last = this.#render().then(() => this.#schedule());
    }, Math.max(0, this.next - performance.now()));
  }

  async #render() {
    const text = this.text;
    const began = performance.now();
    this.busy = true;
    try {
      const part = text.slice(this.start);
      const rendered = part.trim() ? await renderMarkdown(part) : { blocks: [], settled: 0, settled_blocks: 0 };
      const nodes = [...this.nodes.slice(0, this.settled), ...rendered.blocks];
      this.#dropTail();
      if (!this.shown) this.root.replaceChildren();
      patch(this.root, this.nodes, nodes, this.settled);
      this.nodes = nodes;
      this.shown = text;
      this.plain = false;
      this.start += lineStart(part, rendered.settled);
      this.settled += rendered.settled_blocks;
    } catch {
      // Refused, or no server: the letters as they came are an answer too.
      this.plain = true;
      this.next = performance.now() + 1000;
    }
    this.busy = false;
    const now = performance.now();
    this.next = Math.max(this.next, began + MOST_OFTEN, now + (SHARE - 1) * (now - began));
    this.#showTail();
  }

  /** Show the letters that are not rendered yet, if they can only be a continuation of what is shown. */
  #showTail() {
    if (this.plain || !this.shown) {
      this.shown = "";
      this.nodes = [];
      this.start = this.settled = 0;
      this.root.replaceChildren(element("p", { text: this.text }));
      this.tail = null;
    } else {
      this.#dropTail();
      const place = this.#tailPlace();
      if (place) {
        const code = place.tagName === "CODE";
        const letters = (code ? CODE : QUIET).exec(this.text.slice(this.shown.length))?.[0] ?? "";
        const blanks = code ? "" : (/[ \t]*$/.exec(this.shown)?.[0] ?? "");
        this.tail = document.createTextNode(letters && blanks + letters);
        place.append(this.tail);
      }
    }
    this.onChange();
  }

  #dropTail() {
    this.tail?.remove();
    this.tail = null;
  }

  /**
   * Where letters that come next belong; null where that is for the server to say.
   * @returns {Element|null}
   */
  #tailPlace() {
    let node = this.nodes.at(-1);
    let place = this.root.lastElementChild;
    if (!place || this.shown.endsWith("\n") || typeof node !== "object") return null;
    if (node[0] === "block") {
      const closing = /^[ \t]*(```|~~~)/.test(this.shown.slice(this.shown.lastIndexOf("\n") + 1));
      return closing ? null : contentOf(place, "block");
    }
    while (GROUPS.has(node[0])) {
      const child = node[2].at(-1);
      if (typeof child !== "object" || !(GROUPS.has(child[0]) || LINES.has(child[0]))) break;
      node = /** @type {[string, string, any[]]} */ (child);
      place = /** @type {Element} */ (place.lastElementChild);
    }
    return LINES.has(node[0]) ? place : null;
  }
}

/** @param {string} text @param {number} line from 0 @returns {number} where the line begins */
function lineStart(text, line) {
  let at = 0;
  for (; line > 0; line -= 1) at = text.indexOf("\n", at) + 1;
  return at;
}
