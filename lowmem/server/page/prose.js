/**
 * Shows the text of a streaming answer. The server renders it, one request at a time and at most every MOST_OFTEN
 * milliseconds. Letters that arrived since are appended verbatim if they cannot change what is before them.
 */

import { renderMarkdown } from "./api.js";
import { contentOf, patch } from "./nodes.js";
import { element } from "./dom.js";

const MOST_OFTEN = 150;
const SHARE = 4; // rendering uses at most this fraction of the time: 1/SHARE
const LINE_END = /\r\n?/g;
const QUIET = /^[\p{L}\p{N} ,.;?'"()/=+%&]*/u; // characters without a meaning in Markdown inside a line
const CODE = /^[^`~]*/; // characters that cannot end a code block
const LINES = new Set(["paragraph", "heading", "item"]); // kinds that contain the text of a line
const GROUPS = new Set(["list", "numbered", "quotation", "item"]);

export class Prose {
  /** @param {() => void} onChange called after the shown text has changed */
  constructor(onChange) {
    this.root = element("div", { class: "prose" });
    this.onChange = onChange;
    this.text = "";
    /** Whether the server failed to render the shown text. */
    this.plain = false;
    /** @type {import("./nodes.js").Node[]} */
    this.nodes = [];
    this.start = 0; // start of the text that is still rendered; earlier text is final
    this.settled = 0; // final blocks
    this.shown = ""; // the rendered text
    /** @type {globalThis.Text|null} */
    this.tail = null;
    this.busy = false;
    this.finished = false;
    this.timer = 0;
    this.next = 0; // earliest time of the next rendering
    /** @type {Promise<void>|null} */
    this.last = null;
  }

  /**
   * Show the answer so far.
   * @param {string} text
   */
  grow(text) {
    this.text = text.replace(LINE_END, "\n");
    this.#showTail();
    this.#schedule();
  }

  /**
   * Render the complete answer from its beginning. Resolves when it is shown.
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
      // Rendering failed: show the plain text.
      this.plain = true;
      this.next = performance.now() + 1000;
    }
    this.busy = false;
    const now = performance.now();
    this.next = Math.max(this.next, began + MOST_OFTEN, now + (SHARE - 1) * (now - began));
    this.#showTail();
  }

  /** Append the letters that are not rendered yet, if they can only continue the shown text. */
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
   * The element to which new letters belong; null if only the server can tell.
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
