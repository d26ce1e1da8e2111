/** The conversation on the screen: questions, answers and their buttons. */

import { byId, copyButton, element, iconButton } from "./dom.js";
import { shownTurns, versions } from "./conversation.js";
import { Prose } from "./prose.js";

/**
 * @typedef {import("./conversation.js").Conversation} Conversation
 * @typedef {import("./conversation.js").Turn} Turn
 * @typedef {import("./answer.js").Answer} Answer
 * @typedef {{
 *   retry: (turn: Turn) => void, edit: (turn: Turn, text: string) => boolean,
 *   choose: (turn: Turn, step: number) => void,
 *   answerOf: (turn: Turn) => Answer|null, context: () => number
 * }} Actions
 */

const NEAR_THE_END = 60; // pixels from the bottom within which the page follows an answer

export class Thread {
  /** @param {Actions} actions */
  constructor(actions) {
    this.actions = actions;
    this.scroller = byId("scroller");
    this.list = byId("thread");
    this.jump = byId("jump");
    /** @type {Map<string, TurnView>} */
    this.views = new Map();
    /** @type {string|null} */
    this.shownId = null;
    this.following = true;
    this.seenTop = 0; // last known scroll position
    this.scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    // A change of the font size or an on-screen keyboard must not leave the end.
    new ResizeObserver(() => this.follow()).observe(this.scroller);
    new ResizeObserver(() => this.follow()).observe(this.list);
    this.jump.addEventListener("click", () => {
      this.toEnd();
      byId("question").focus();
    });
  }

  /**
   * Show a conversation; null shows the start page.
   * @param {Conversation|null} conversation
   */
  show(conversation) {
    const other = this.shownId !== (conversation?.id ?? null);
    if (other) this.views.clear();
    this.shownId = conversation?.id ?? null;
    const turns = conversation ? shownTurns(conversation) : [];
    const versionsOf = (/** @type {Turn} */ turn) => (conversation ? versions(conversation, turn) : []);
    const views = turns.map((turn, index) => this.#view(turn, versionsOf(turn), index, turns));
    this.views = new Map(views.map((view) => [view.turn.id, view]));
    const focus = this.#focus();
    replaceInOrder(this.list, views.map((view) => view.root));
    focus();
    byId("welcome").hidden = turns.length > 0;
    this.list.hidden = turns.length === 0;
    if (other) this.toEnd();
    // The last turn is visible: render it first, then the others one by one.
    return views.reduceRight((before, view) => before.then(() => view.render()), Promise.resolve());
  }

  /**
   * Show a new piece of an answer.
   * @param {Answer} answer
   */
  grow(answer) {
    this.views.get(answer.turn.id)?.grow(answer);
  }

  /** Render the texts that failed while the server was unreachable. */
  mend() {
    for (const view of this.views.values()) view.mend();
  }

  /** Edit the last question; returns false without a question. */
  editLast() {
    const view = [...this.views.values()].reverse().find((one) => one.turn.role === "user");
    view?.edit();
    return Boolean(view);
  }

  toEnd() {
    this.following = true;
    this.seenTop = 0;
    this.follow();
  }

  /** Follow the end, unless the user has just scrolled up, for which no event may have arrived yet. */
  follow() {
    if (this.scroller.scrollTop < this.seenTop - 1 && !this.#nearTheEnd()) this.following = false;
    if (this.following) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.seenTop = this.scroller.scrollTop;
    this.#showJump();
  }

  /** Buttons are created anew: move the focus to the button in the same place. */
  #focus() {
    const focused = document.activeElement;
    const index = [...this.list.children].findIndex((child) => child.contains(focused));
    const label = focused?.getAttribute("aria-label");
    return () => {
      if (index < 0 || !label || document.activeElement === focused && focused?.isConnected) return;
      const turn = this.list.children[index];
      const buttons = /** @type {HTMLButtonElement[]} */ ([...(turn?.querySelectorAll(".tools button") ?? [])]);
      const same = buttons.find((button) => button.getAttribute("aria-label") === label);
      (same?.disabled ? buttons.find((button) => !button.disabled) : same)?.focus();
    };
  }

  #nearTheEnd() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight < NEAR_THE_END;
  }

  #scrolled() {
    this.following = this.#nearTheEnd();
    this.seenTop = this.scroller.scrollTop;
    this.#showJump();
  }

  #showJump() {
    this.jump.hidden = this.following;
  }

  /**
   * @param {Turn} turn @param {Turn[]} all versions of it @param {number} index @param {Turn[]} turns
   * @returns {TurnView}
   */
  #view(turn, all, index, turns) {
    const view = this.views.get(turn.id) ?? new TurnView(turn, this.actions, () => this.follow());
    view.update(turn, all, index === turns.length - 1, Math.floor(index / 2) + 1);
    return view;
  }
}

/** A question or an answer. */
class TurnView {
  /** @param {Turn} turn @param {Actions} actions @param {() => void} onChange */
  constructor(turn, actions, onChange) {
    this.turn = turn;
    this.actions = actions;
    const question = turn.role === "user";
    this.prose = question ? null : new Prose(onChange);
    this.rendered = ""; // the text that is shown in its final form
    this.heading = element("h2", { class: "visually-hidden" });
    const content = question ? element("div", { class: "bubble" }) : this.prose?.root;
    this.body = element("div", { class: "turn-body" }, content);
    this.note = element("div", { class: "note" });
    this.figures = element("span", { class: "figures" });
    this.tools = element("div", { class: "tools" });
    this.root = element(
      "article", { class: `turn ${question ? "question" : "answer"}`, data: { turn: turn.id } },
      this.heading, this.body, this.note, this.tools,
    );
  }

  /**
   * @param {Turn} turn @param {Turn[]} all versions of it @param {boolean} last @param {number} number number of the exchange
   */
  update(turn, all, last, number) {
    this.turn = turn;
    const running = this.actions.answerOf(turn);
    const state = turn.state === "streaming" && !running ? "interrupted" : turn.state;
    this.root.dataset.state = state;
    if (state === "streaming") this.root.setAttribute("aria-busy", "true");
    this.root.classList.toggle("is-last", last);
    this.heading.textContent = `${turn.role === "user" ? "Question" : "Answer"} ${number}`;
    this.root.setAttribute("aria-label", this.heading.textContent);
    if (turn.role === "user") this.#fillQuestion(all);
    else this.#fillAnswer(state, all);
  }

  /** Show the answer in its final form, unless it is shown already. */
  async render() {
    const done = this.prose && this.root.dataset.state !== "streaming";
    if (!done || this.rendered === this.turn.text) return;
    this.rendered = this.turn.text;
    this.root.setAttribute("aria-busy", "true");
    await this.prose?.finish(this.turn.text);
    this.root.setAttribute("aria-busy", "false");
  }

  mend() {
    if (this.prose?.plain && this.root.dataset.state !== "streaming") this.prose.finish(this.turn.text);
  }

  /** @param {Answer} answer */
  grow(answer) {
    this.prose?.grow(answer.turn.text);
    this.#showProgress(answer);
  }

  /** Edit the question in a field; sending it adds another version here. */
  edit() {
    if (this.body.querySelector("textarea")) return;
    const field = element("textarea", { class: "edit-field", "aria-label": "Edit the question", rows: 1 });
    const close = () => {
      this.body.replaceChildren(element("div", { class: "bubble", text: this.turn.text }));
      this.tools.hidden = false;
    };
    const send = () => {
      const text = field.value.trim();
      if (!text) return;
      close();
      this.actions.edit(this.turn, text);
    };
    const cancel = () => {
      close();
      byId("question").focus();
    };
    field.value = this.turn.text;
    field.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
      } else if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        send();
      }
    });
    this.tools.hidden = true;
    this.body.replaceChildren(element(
      "div", { class: "edit-box" }, field,
      element(
        "div", { class: "edit-buttons" },
        element("button", { type: "button", class: "button", text: "Cancel", on: { click: cancel } }),
        element("button", { type: "button", class: "button primary", text: "Send", on: { click: send } }),
      ),
    ));
    const fit = () => {
      field.style.height = "auto";
      field.style.height = `${field.scrollHeight + 2}px`;
    };
    field.addEventListener("input", fit);
    fit();
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
    this.root.scrollIntoView({ block: "nearest" });
  }

  /** @param {Turn[]} all */
  #fillQuestion(all) {
    const bubble = this.body.querySelector(".bubble");
    if (bubble) bubble.textContent = this.turn.text;
    this.tools.replaceChildren(
      ...this.#versionTools(all),
      copyButton(() => this.turn.text, "Copy the question"),
      iconButton("edit", "Edit the question", () => this.edit()),
    );
  }

  /** @param {string} state @param {Turn[]} all */
  #fillAnswer(state, all) {
    const { turn } = this;
    const running = this.actions.answerOf(turn);
    if (running) {
      this.note.replaceChildren();
      this.tools.replaceChildren(this.figures);
      this.#showProgress(running);
      if (turn.text) this.prose?.grow(turn.text);
      return;
    }
    this.figures.replaceChildren(...figuresTexts(turn).map((text) => element("span", { text })));
    this.tools.replaceChildren(...[
      ...this.#versionTools(all),
      turn.text && copyButton(() => turn.text, "Copy the answer"),
      !turn.problem && iconButton("retry", "Try again", () => this.actions.retry(turn)),
      this.figures,
    ].filter((tool) => tool !== "" && tool !== false));
    const said = noteOf(turn, state, this.actions.context());
    this.note.className = `note ${turn.problem ? "is-problem" : ""}`;
    this.note.replaceChildren(
      ...(said ? [element("p", { text: said }), turn.problem && element("button", {
        type: "button", class: "button", text: "Try again", on: { click: () => this.actions.retry(turn) },
      })].filter(Boolean) : []),
    );
  }

  /** @param {Answer} answer */
  #showProgress(answer) {
    const texts = answer.pieces ? [`about ${plural(answer.pieces, "token")}`] : ["Reading the question…"];
    if (answer.rate) texts.push(`${answer.rate.toFixed(1)} tokens/s`);
    this.figures.replaceChildren(...texts.map((text) => element("span", { text })));
  }

  /** @param {Turn[]} all @returns {HTMLElement[]} */
  #versionTools(all) {
    if (all.length < 2) return [];
    const at = all.findIndex((one) => one.id === this.turn.id);
    const what = this.turn.role === "user" ? "question" : "answer";
    const step = (/** @type {string} */ name, /** @type {string} */ label, /** @type {number} */ by) => {
      const button = iconButton(name, label, () => this.actions.choose(this.turn, by));
      button.disabled = !all[at + by];
      return button;
    };
    return [element(
      "span", { class: "versions", role: "group", "aria-label": `Versions of this ${what}` },
      step("left", `Earlier version of the ${what}`, -1),
      element("span", { class: "version", text: `${at + 1} / ${all.length}` }),
      step("right", `Later version of the ${what}`, 1),
    )];
  }
}

/**
 * Why an answer ended, if the model did not end it.
 * @param {Turn} turn @param {string} state @param {number} context size of the server's context in tokens
 */
function noteOf(turn, state, context) {
  if (turn.problem) return turn.text ? `${turn.problem} What came is kept.` : turn.problem;
  if (state === "stopped") return turn.text ? "Stopped." : "Stopped before the first token.";
  if (state === "interrupted") return "Interrupted: the page was closed before the answer was complete.";
  const { figures } = turn;
  if (turn.finish === "length" && figures) {
    const full = context > 0 && figures.prompt + figures.tokens >= context;
    if (full) return `Cut: the context of ${context.toLocaleString("en")} tokens is full. Start a new conversation.`;
    if (turn.limit && figures.tokens < turn.limit) return "Cut: the time limit of the server was reached.";
    return `Cut at ${plural(figures.tokens, "token")}, the limit in Settings.`;
  }
  if (turn.left) return `The first ${plural(turn.left, "question")} did not fit the context and ${turn.left === 1 ? "was" : "were"} left out.`;
  return turn.text ? "" : "The answer is empty.";
}

/** @param {Turn} turn @returns {string[]} */
function figuresTexts({ figures }) {
  if (!figures) return [];
  const { exact, tokens, rate, first } = figures;
  return [
    `${exact ? "" : "about "}${plural(tokens, "token")}`,
    ...(rate ? [`${rate.toFixed(1)} tokens/s`] : []),
    `first after ${first < 1 ? `${Math.round(first * 1000)} ms` : `${first.toFixed(1)} s`}`,
  ];
}

/** @param {number} count @param {string} noun */
function plural(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}

/**
 * Replace the children of a list without moving those that are in their place.
 * @param {Element} list @param {Element[]} children
 */
function replaceInOrder(list, children) {
  children.forEach((child, index) => {
    if (list.children[index] !== child) list.insertBefore(child, list.children[index] ?? null);
  });
  while (list.children.length > children.length) list.lastElementChild?.remove();
}
