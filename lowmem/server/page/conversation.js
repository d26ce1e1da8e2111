/**
 * Conversations as trees: an edited question or a retried answer becomes a sibling of the old one, and `chosen` selects
 * which one is shown. This module touches neither the page nor the storage.
 *
 * @typedef {"streaming"|"done"|"stopped"|"interrupted"|"failed"} TurnState of an answer
 * @typedef {{exact: boolean, prompt: number, tokens: number, cached: number, first: number, rate: number}} Figures
 *   prompt, tokens, cached: token counts of prompt, answer and cached part of the prompt. first: seconds to the first
 *   token. rate: tokens per second. exact: counted by the server; otherwise pieces were counted, which may join tokens
 * @typedef {{
 *   id: string, parent: string, role: "user"|"assistant", text: string, created: number, state: TurnState,
 *   finish?: string, limit?: number, left?: number, problem?: string, figures?: Figures
 * }} Turn parent: a turn's id, or ROOT. finish: the server's finish_reason. limit: max_tokens of the request.
 *   left: exchanges dropped at the start to fit the context. problem: the error in words
 * @typedef {{
 *   id: string, title: string, named: boolean, created: number, updated: number,
 *   turns: Turn[], chosen: Record<string, string>
 * }} Conversation named: the user set the title. chosen: the shown child of each parent
 */

export const ROOT = "root";
const TITLE_LENGTH = 60;
const STATES = ["streaming", "done", "stopped", "interrupted", "failed"];

/** @returns {Conversation} */
export function newConversation() {
  const now = Date.now();
  return { id: newId(), title: "New conversation", named: false, created: now, updated: now, turns: [], chosen: {} };
}

/** A unique id of letters and digits. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(9));
  return Array.from(bytes, (byte) => byte.toString(36).padStart(2, "0")).join("");
}

/**
 * The shown turns, in order.
 * @param {Conversation} conversation
 * @returns {Turn[]}
 */
export function shownTurns(conversation) {
  const byId = new Map(conversation.turns.map((turn) => [turn.id, turn]));
  /** @type {Turn[]} */
  const shown = [];
  let turn = byId.get(conversation.chosen[ROOT]);
  while (turn && !shown.includes(turn)) {
    shown.push(turn);
    turn = byId.get(conversation.chosen[turn.id]);
  }
  return shown;
}

/**
 * A turn and its siblings, oldest first.
 * @param {Conversation} conversation
 * @param {Turn} turn
 */
export function versions(conversation, turn) {
  return conversation.turns.filter((other) => other.parent === turn.parent && other.role === turn.role);
}

/**
 * Add a turn after `parent`, and show it.
 * @param {Conversation} conversation
 * @param {string} parent
 * @param {"user"|"assistant"} role
 * @param {string} text
 * @returns {Turn}
 */
export function addTurn(conversation, parent, role, text) {
  /** @type {Turn} */
  const turn = {
    id: newId(), parent, role, text, created: Date.now(), state: role === "user" ? "done" : "streaming",
  };
  conversation.turns.push(turn);
  conversation.chosen[parent] = turn.id;
  conversation.updated = turn.created;
  if (role === "user" && parent === ROOT && !conversation.named) conversation.title = titleOf(text);
  return turn;
}

/**
 * Show another version of a turn, `step` versions later.
 * @param {Conversation} conversation
 * @param {Turn} turn
 * @param {number} step
 */
export function chooseVersion(conversation, turn, step) {
  const all = versions(conversation, turn);
  const next = all[all.indexOf(turn) + step];
  if (next) conversation.chosen[turn.parent] = next.id;
}

/**
 * The messages of a request: everything shown up to a question. A question without an answer is joined with the next
 * one, since roles must alternate.
 * @param {Conversation} conversation
 * @param {Turn} question the last one
 * @param {string} system
 * @returns {{role: string, content: string}[]}
 */
export function requestMessages(conversation, question, system) {
  const messages = system.trim() ? [{ role: "system", content: system }] : [];
  for (const turn of shownTurns(conversation)) {
    const last = messages.at(-1);
    if (turn.role === "user" && last?.role === "user") last.content += `\n\n${turn.text}`;
    else if (turn.text) messages.push({ role: turn.role, content: turn.text });
    if (turn.id === question.id) break;
  }
  return messages;
}

/**
 * A title from a question: its first line, cut at a word.
 * @param {string} text
 */
export function titleOf(text) {
  const line = text.trim().split("\n", 1)[0].replace(/\s+/g, " ");
  if (line.length <= TITLE_LENGTH) return line || "New conversation";
  const cut = line.slice(0, TITLE_LENGTH);
  return `${cut.slice(0, Math.max(cut.lastIndexOf(" "), TITLE_LENGTH - 20)).trimEnd()}…`;
}

/**
 * Whether a stored value is a valid conversation; another version of the page may have written it.
 * @param {any} value
 * @returns {value is Conversation}
 */
export function isConversation(value) {
  return (
    typeof value === "object" && value !== null
    && typeof value.id === "string" && typeof value.title === "string"
    && typeof value.updated === "number" && typeof value.chosen === "object" && value.chosen !== null
    && Array.isArray(value.turns)
    && value.turns.every(
      (/** @type {any} */ turn) =>
        typeof turn?.id === "string" && typeof turn.parent === "string" && typeof turn.text === "string"
        && (turn.role === "user" || turn.role === "assistant") && STATES.includes(turn.state),
    )
  );
}

/**
 * The shown turns of a conversation as Markdown.
 * @param {Conversation} conversation
 */
export function asMarkdown(conversation) {
  const parts = [`# ${conversation.title}`];
  for (const turn of shownTurns(conversation)) {
    parts.push(turn.role === "user" ? "## Question" : "## Answer", turn.text.trim());
  }
  return `${parts.join("\n\n")}\n`;
}
