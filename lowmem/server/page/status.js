/** The state of the server: polled while the page is visible, and shown in a line and a dialog. */

import { readStatus, ServerError } from "./api.js";
import { byId, element, formatBytes } from "./dom.js";

/** @typedef {import("./api.js").Status} Status */
/** @typedef {"there"|"gone"|"locked"} Reach of the server; locked: it requires a key */

const IDLE = 5000; // milliseconds between two polls
const BUSY = 1500; // while waiting for an answer
/** @type {Record<Reach, string>} */
const WORDS = { there: "", gone: "No connection to the server", locked: "The server requires an API key" };

export class StatusView {
  /**
   * @param {{onBack: () => void, onKey: () => void}} listeners onBack: the server is reachable again; onKey: it requires a key
   */
  constructor(listeners) {
    this.listeners = listeners;
    /** @type {Status|null} */
    this.status = null;
    /** @type {Reach} */
    this.reach = "there";
    this.busy = false;
    this.asking = false;
    this.timer = 0;
    this.dialog = byId("about");
    byId("status").addEventListener("click", () => {
      if (this.reach === "locked") {
        listeners.onKey();
        return;
      }
      this.#fill();
      this.dialog.showModal();
    });
    document.addEventListener("visibilitychange", () => this.refresh());
    this.refresh();
  }

  /** Poll now and regularly. */
  async refresh() {
    clearTimeout(this.timer);
    if (document.hidden || this.asking) return;
    this.asking = true;
    const before = this.reach;
    try {
      this.status = await readStatus();
      this.reach = "there";
    } catch (error) {
      this.reach = error instanceof ServerError && error.status === 401 ? "locked" : "gone";
    }
    this.asking = false;
    if (this.reach === "locked" && before !== "locked") this.listeners.onKey(); // only once
    if (this.reach === "there" && before !== "there") this.listeners.onBack();
    this.show();
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.refresh(), this.busy ? BUSY : IDLE);
  }

  /** @param {boolean} busy whether this page waits for an answer */
  setBusy(busy) {
    if (this.busy === busy) return;
    this.busy = busy;
    this.refresh();
  }

  show() {
    const { status } = this;
    const there = this.reach === "there";
    const figures = there && status ? figuresOf(status) : [];
    byId("status").classList.toggle("is-gone", !there);
    byId("status-model").textContent = there ? (status?.model ?? "Connecting…") : WORDS[this.reach];
    byId("status-figures").replaceChildren(...figures.map(([kind, text]) => element("span", { class: kind, text })));
    if (status) byId("welcome-model").textContent = status.model;
    if (this.dialog.open) this.#fill();
  }

  #fill() {
    const { status } = this;
    byId("about-plan").textContent = status?.plan ?? "The server has not answered yet.";
    const facts = byId("about-facts");
    if (!status) {
      facts.replaceChildren();
      return;
    }
    const planned = status.need_bytes;
    const { bytes, where } = heldBy(status);
    const share = planned ? ` of ${formatBytes(planned)} planned` : "";
    /** @type {[string, string][]} */
    const rows = [
      ["Model", status.model],
      ["Form", `${status.label}, ${formatBytes(status.weight_bytes)} of weights`],
      ["Runs on", status.kernel ? `${status.device}, kernel ${status.kernel}` : status.device],
      ["Context", `${status.context.toLocaleString("en")} tokens of questions and answers together`],
      ["Memory held", `${formatBytes(bytes)}${share}${where}`],
      ["Speed", status.tokens_per_second ? `${status.tokens_per_second.toFixed(1)} tokens/s` : "no answer yet"],
      ["Answers", status.slots > 1 ? `${status.running} of up to ${status.slots} at once` : "one at a time"],
      ["Waiting", status.queue ? `${status.queue} in the queue` : "none"],
    ];
    facts.replaceChildren(...rows.flatMap(([name, text]) => [element("dt", { text: name }), element("dd", { text })]));
    const meter = byId("about-meter");
    meter.hidden = !planned;
    meter.max = planned || 1;
    meter.value = Math.min(bytes, planned);
  }
}

/** @param {Status} status @returns {string[][]} label and text of each figure */
function figuresOf(status) {
  const { bytes, where } = heldBy(status);
  return [
    ["form", status.label],
    ["speed", status.tokens_per_second ? `${status.tokens_per_second.toFixed(1)} tokens/s` : ""],
    ["memory", `${formatBytes(bytes)}${where}`],
    ["planned", status.need_bytes ? `${formatBytes(status.need_bytes)} planned` : ""],
    ["running", status.running > 1 ? `${status.running} answers at once` : ""],
    ["queue", status.queue ? `${status.queue} waiting` : ""],
  ].filter(([, text]) => text);
}

/** Memory on the card, if there is one, else on the host. @param {Status} status */
function heldBy({ memory }) {
  return memory.card ? { bytes: memory.card, where: " on the card" } : { bytes: memory.host, where: "" };
}
