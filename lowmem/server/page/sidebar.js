/** The list of conversations: a sidebar, or a drawer on a narrow screen. */

import { byId, element, iconButton } from "./dom.js";
import { readValue, writeValue } from "./store.js";

/**
 * @typedef {import("./conversation.js").Conversation} Conversation
 * @typedef {{rename: (id: string, title: string) => void, remove: (id: string) => void}} Actions
 */

const DAY = 86_400_000;

export class Sidebar {
  /** @param {Actions} actions */
  constructor(actions) {
    this.actions = actions;
    this.root = byId("sidebar");
    this.list = byId("conversations");
    this.button = byId("toggle-sidebar");
    this.narrow = matchMedia("(max-width: 52rem)");
    this.open = this.#wanted();
    this.button.addEventListener("click", () => this.setOpen(!this.open));
    byId("close-sidebar").addEventListener("click", () => this.setOpen(false));
    byId("scrim").addEventListener("click", () => this.setOpen(false));
    this.root.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key === "Escape" && this.narrow.matches) {
        event.stopPropagation();
        this.setOpen(false);
      }
    });
    this.root.addEventListener("click", (/** @type {Event} */ event) => {
      const chosen = /** @type {Element} */ (event.target).closest("a, #new-chat");
      if (this.narrow.matches && chosen) this.setOpen(false, false);
    });
    this.narrow.addEventListener("change", () => {
      this.open = this.#wanted();
      this.#show();
    });
    this.#show();
  }

  /** @param {boolean} open @param {boolean} [focus] move the focus with the drawer */
  setOpen(open, focus = true) {
    this.open = open;
    if (!this.narrow.matches) writeValue("sidebar", open ? "open" : "closed");
    this.#show();
    if (!focus || !this.narrow.matches) return;
    (open ? byId("close-sidebar") : this.button).focus();
  }

  /**
   * @param {Conversation[]} conversations newest first
   * @param {string|null} current the shown one
   * @param {Set<string>} running conversations that wait for an answer
   */
  show(conversations, current, running) {
    if (this.list.querySelector("input")) return; // a title is being edited
    const focused = /** @type {HTMLElement|null} */ (document.activeElement)?.dataset?.focus;
    const groups = new Map();
    for (const one of conversations) {
      const name = dayName(one.updated);
      groups.set(name, [...(groups.get(name) ?? []), one]);
    }
    this.list.replaceChildren(
      ...[...groups].map(([name, members], index) => element(
        "section", { "aria-labelledby": `day-${index}` },
        element("h2", { class: "day", id: `day-${index}`, text: name }),
        element("ul", {}, ...members.map((/** @type {Conversation} */ one) =>
          this.#item(one, one.id === current, running.has(one.id)))),
      )),
    );
    byId("no-conversations").hidden = conversations.length > 0;
    if (focused) this.list.querySelector(`[data-focus="${CSS.escape(focused)}"]`)?.focus();
  }

  /** @param {Conversation} one @param {boolean} current @param {boolean} running */
  #item({ id, title }, current, running) {
    const rename = iconButton("edit", `Rename “${title}”`, () => this.#rename(item, id, title));
    const remove = iconButton("trash", `Delete “${title}”`, () => this.#remove(item, id));
    rename.dataset.focus = `rename ${id}`;
    const item = element(
      "li", { class: `conversation${current ? " is-current" : ""}` },
      element(
        "a", { href: `#/${id}`, "aria-current": current ? "page" : null, title, data: { focus: `open ${id}` } },
        running && element("span", { class: "dot", role: "img", "aria-label": "Answering" }),
        element("span", { class: "title", text: title }),
      ),
      element("span", { class: "item-tools" }, rename, remove),
    );
    return item;
  }

  /** @param {HTMLElement} item @param {string} id */
  #remove(item, id) {
    const links = [...this.list.querySelectorAll("a")];
    const next = links[links.indexOf(item.querySelector("a")) + 1] ?? links.at(-2);
    const focus = next?.dataset.focus;
    this.actions.remove(id);
    (focus ? this.list.querySelector(`[data-focus="${CSS.escape(focus)}"]`) : byId("new-chat"))?.focus();
  }

  /** @param {HTMLElement} item @param {string} id @param {string} title */
  #rename(item, id, title) {
    const field = element("input", { class: "rename", "aria-label": "Title of the conversation", maxlength: 120 });
    field.value = title;
    let open = true;
    const close = (/** @type {boolean} */ keep, /** @type {boolean} */ focus) => {
      if (!open) return;
      open = false;
      field.remove();
      this.actions.rename(id, keep && field.value.trim() ? field.value.trim() : title);
      if (focus) this.list.querySelector(`[data-focus="${CSS.escape(`rename ${id}`)}"]`)?.focus();
    };
    field.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.preventDefault();
      event.stopPropagation();
      close(event.key === "Enter", true);
    });
    field.addEventListener("blur", () => close(true, false));
    item.replaceChildren(field);
    field.select();
  }

  /** Open on a wide screen, unless the user closed it there. */
  #wanted() {
    return !this.narrow.matches && readValue("sidebar") !== "closed";
  }

  #show() {
    const drawer = this.narrow.matches;
    document.body.classList.toggle("sidebar-open", this.open);
    this.root.inert = !this.open;
    byId("main").inert = drawer && this.open;
    byId("scrim").hidden = !(drawer && this.open);
    this.button.setAttribute("aria-expanded", String(this.open));
    const label = this.open ? "Hide conversations" : "Show conversations";
    this.button.setAttribute("aria-label", label);
    this.button.title = label;
  }
}

/** @param {number} time @returns {string} a heading such as "Last seven days" */
function dayName(time) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (time >= today) return "Today";
  if (time >= today - DAY) return "Yesterday";
  if (time >= today - 7 * DAY) return "Last seven days";
  return "Older";
}
