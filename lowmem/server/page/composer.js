/** The question field: it grows, keeps a draft, and its button stops the current answer. */

import { byId, isTouched } from "./dom.js";
import { readDraft, writeDraft } from "./store.js";

/**
 * @typedef {{send: (text: string) => boolean, stop: () => void, editLast: () => boolean}} Actions
 *   send: returns false if the question was not accepted
 */

export class Composer {
  /** @param {Actions} actions */
  constructor(actions) {
    this.actions = actions;
    this.form = byId("composer");
    this.field = /** @type {HTMLTextAreaElement} */ (byId("question"));
    this.button = /** @type {HTMLButtonElement} */ (byId("send"));
    this.draft = "new"; // the conversation's id, or "new"
    this.opened = false;
    this.running = false;
    this.timer = 0;
    this.form.addEventListener("submit", (/** @type {Event} */ event) => {
      event.preventDefault();
      if (this.running) actions.stop();
      else this.#send();
    });
    this.field.addEventListener("keydown", (event) => this.#key(event));
    this.field.addEventListener("input", () => {
      this.#fit();
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.keep(), 200);
    });
    addEventListener("pagehide", () => this.keep());
  }

  /**
   * Show the draft of another conversation.
   * @param {string} id of the conversation, or "new"
   */
  open(id) {
    if (id === this.draft && this.opened) return;
    if (this.opened) this.keep();
    this.opened = true;
    this.draft = id;
    this.put(readDraft(id));
  }

  /** Save the draft. */
  keep() {
    clearTimeout(this.timer);
    writeDraft(this.draft, this.field.value);
  }

  /** @param {string} text */
  put(text) {
    this.field.value = text;
    this.#fit();
  }

  /** @param {boolean} running whether the shown conversation waits for an answer */
  setRunning(running) {
    this.running = running;
    this.button.classList.toggle("is-stop", running);
    this.button.setAttribute("aria-label", running ? "Stop" : "Send");
    this.button.title = running ? "Stop (Esc)" : "Send (Enter)";
    this.button.querySelector("use")?.setAttribute("href", running ? "#icon-stop" : "#icon-send");
    this.#enable();
  }

  focus() {
    this.field.focus();
  }

  #send() {
    const text = this.field.value.trim();
    if (!text || this.running) return;
    const draft = this.draft;
    if (!this.actions.send(text)) return;
    clearTimeout(this.timer);
    writeDraft(draft, "");
    writeDraft(this.draft, "");
    this.put("");
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey && !event.altKey && !isTouched()) {
      event.preventDefault();
      this.#send();
    } else if (event.key === "ArrowUp" && !this.field.value && !this.running && this.actions.editLast()) {
      event.preventDefault();
    }
  }

  #fit() {
    this.field.style.height = "auto";
    this.field.style.height = `${this.field.scrollHeight}px`;
    this.#enable();
  }

  #enable() {
    this.button.disabled = !this.running && !this.field.value.trim();
  }
}
