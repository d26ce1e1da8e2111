import { announce } from "./dom.js";

const EVERY = 2500; // milliseconds between two announcements
const ENDS = [". ", "! ", "? ", "\n"]; // ends of sentences

/** Announces an answer to screen readers in whole sentences, at a limited rate. */
export class Speaker {
  constructor() {
    this.spoken = 0;
    this.timer = 0;
  }

  /** @param {string} text the answer so far @param {boolean} [complete] */
  say(text, complete = false) {
    this.text = text;
    this.complete = complete;
    if (complete) {
      clearTimeout(this.timer);
      this.#speak();
    } else {
      this.timer ||= setTimeout(() => this.#speak(), EVERY);
    }
  }

  #speak() {
    this.timer = 0;
    const fresh = (this.text ?? "").slice(this.spoken);
    const end = this.complete ? fresh.length : Math.max(...ENDS.map((mark) => fresh.lastIndexOf(mark))) + 1;
    const sentences = fresh.slice(0, end).replace(/[`*#]+/g, "").trim();
    if (sentences) announce(sentences);
    this.spoken += end;
  }
}
