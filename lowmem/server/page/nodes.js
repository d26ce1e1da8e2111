/**
 * Creates elements from the server's tree of an answer. A node is a text or [kind, detail, children]. The kinds are a
 * closed set; the content of a node becomes text, or an attribute whose value is checked here.
 *
 * @typedef {string|[string, string, any[]]} Node
 */

import { copyButton, element } from "./dom.js";

/** @type {Record<string, string>} kinds whose element has only its children */
const PLAIN = {
  paragraph: "p", quotation: "blockquote", list: "ul", item: "li", head: "thead", body: "tbody", row: "tr",
  emphasis: "em", strong: "strong", deleted: "s", rule: "hr", break: "br", code: "code",
};
const CLASSES = new Set([
  "added", "attribute", "builtin", "comment", "constant", "escape", "function", "keyword", "meta", "number",
  "removed", "string", "type",
]);
const SCHEMES = ["http:", "https:", "mailto:"];

/**
 * Update `parent` from the nodes `before` to the nodes `after`. Unchanged elements stay in place, so that selections,
 * focused buttons and scrolled code blocks survive while an answer grows.
 * @param {Element} parent
 * @param {Node[]} before
 * @param {Node[]} after
 * @param {number} [from] earlier nodes are known to be unchanged
 */
export function patch(parent, before, after, from = 0) {
  for (let index = from; index < after.length; index += 1) {
    const shown = /** @type {any} */ (parent.childNodes[index]);
    if (index >= before.length) parent.append(make(after[index]));
    else if (!patchNode(shown, before[index], after[index])) shown.replaceWith(make(after[index]));
  }
  while (parent.childNodes.length > after.length) parent.lastChild?.remove();
}

/**
 * @param {any} shown @param {Node} before @param {Node} after
 * @returns {boolean} whether the element was kept
 */
function patchNode(shown, before, after) {
  if (typeof before === "string" || typeof after === "string") {
    if (typeof before !== typeof after) return false;
    if (before !== after) shown.data = after;
    return true;
  }
  if (before[0] !== after[0] || before[1] !== after[1]) return false;
  patch(contentOf(shown, after[0]), before[2], after[2]);
  return true;
}

/**
 * The element that holds the children of a node.
 * @param {Element} shown
 * @param {string} kind
 * @returns {Element}
 */
export function contentOf(shown, kind) {
  if (kind === "block") return /** @type {Element} */ (shown.querySelector("code"));
  return kind === "table" ? /** @type {Element} */ (shown.firstElementChild) : shown;
}

/**
 * @param {Node} node
 * @returns {globalThis.Node}
 */
export function make(node) {
  if (typeof node === "string") return document.createTextNode(node);
  const [kind, detail, children] = node;
  const made = makeElement(kind, detail);
  contentOf(made, kind).append(...children.map(make));
  return made;
}

/** @param {string} kind @param {string} detail @returns {HTMLElement} */
function makeElement(kind, detail) {
  if (Object.hasOwn(PLAIN, kind)) return element(PLAIN[kind]);
  switch (kind) {
    case "heading": // below the page's own headings
      return element(`h${Math.min(level(detail) + 2, 6)}`, { class: `level-${level(detail)}` });
    case "numbered":
      return element("ol", { start: Number.parseInt(detail, 10) || 0 });
    case "header":
    case "cell": {
      const side = ["left", "center", "right"].includes(detail) ? `align-${detail}` : null;
      return element(kind === "header" ? "th" : "td", { class: side });
    }
    case "table":
      return element("div", { class: "table" }, element("table"));
    case "link":
      return makeLink(detail);
    case "span":
      return element("span", { class: CLASSES.has(detail) ? `code-${detail}` : null });
    case "block":
      return makeCodeBlock(detail);
    default:
      return element("span");
  }
}

/** @param {string} detail @returns {number} of a heading, 1 to 6 */
function level(detail) {
  return /^[1-6]$/.test(detail) ? Number(detail) : 1;
}

/** @param {string} address @returns {HTMLElement} a link, or plain text if the address is not allowed */
function makeLink(address) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return element("span");
  }
  if (!SCHEMES.includes(url.protocol)) return element("span");
  return element("a", { href: url.href, title: url.href, target: "_blank", rel: "noopener noreferrer nofollow" });
}

/** @param {string} label of the language @returns {HTMLElement} */
function makeCodeBlock(label) {
  const code = element("code");
  return element(
    "div",
    { class: "code", role: "group", "aria-label": label ? `Code: ${label}` : "Code" },
    element(
      "div",
      { class: "code-head" },
      element("span", { class: "language", text: label || "Code" }),
      copyButton(() => code.textContent, "Copy the code", true),
    ),
    element("pre", {}, code),
  );
}
