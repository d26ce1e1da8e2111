/**
 * What was said, as a tree: a question that is edited and an answer that is tried again become brothers of the
 * old ones, and `chosen` says which of them is shown. Nothing here touches the page or the storage.
 *
 * @typedef {"streaming"|"done"|"stopped"|"interrupted"|"failed"} TurnState of an answer
 * @typedef {{exact: boolean, prompt: number, tokens: number, cached: number, first: number, rate: number}} Figures
 *   tokens of the prompt, of the answer and of the prompt's known part; seconds to the first; tokens a second.
 *   exact: the server counted; else pieces were, which are tokens as long as the browser keeps up
 * @typedef {{
 *   id: string, parent: string, role: "user"|"assistant", text: string, created: number, state: TurnState,
 *   finish?: string, limit?: number, left?: number, problem?: string, figures?: Figures
 * }} Turn parent: a turn's id, or ROOT. finish: the server's reason. limit: tokens that the answer might have had.
 *   left: exchanges at the start that were left out to fit the context. problem: what went wrong, in words
 * @typedef {{
 *   id: string, title: string, named: boolean, created: number, updated: number,
 *   turns: Turn[], chosen: Record<string, string>
 * }} Conversation named: a person gave the title. chosen: for each parent, which of its children is shown
 */

export const ROOT = "root";
const TITLE_LENGTH = 60;
const STATES = ["streaming", "done", "stopped", "interrupted", "failed"];

/** @returns {Conversation} */
export function newConversation() {
  const now = Date.now();
  return { id: newId(), title: "New conversation", named: false, created: now, updated: now, turns: [], chosen: {} };
}

/** Letters and digits that no other conversation or turn has. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(9));
  return Array.from(bytes, (byte) => byte.toString(36).padStart(2, "0")).join("");
}

/**
 * The turns that are shown, first to last.
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
 * A turn and its brothers, oldest first.
 * @param {Conversation} conversation
 * @param {Turn} turn
 */
export function versions(conversation, turn) {
  return conversation.turns.filter((other) => other.parent === turn.parent && other.role === turn.role);
}

/**
 * Add a turn behind `parent`, and show it.
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
 * Show another version of a turn: `step` of them later.
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
 * The messages that a request holds: everything shown up to a question. Questions that got no answer are put
 * together with the next, since a dialogue has its roles in turns.
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
 * A title made of a question: its first line, cut at a word.
 * @param {string} text
 */
export function titleOf(text) {
  const line = text.trim().split("\n", 1)[0].replace(/\s+/g, " ");
  if (line.length <= TITLE_LENGTH) return line || "New conversation";
  const cut = line.slice(0, TITLE_LENGTH);
  return `${cut.slice(0, Math.max(cut.lastIndexOf(" "), TITLE_LENGTH - 20)).trimEnd()}…`;
}

/**
 * Whether something from the storage is a conversation: another version of the page may have written it.
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
 * What is shown of a conversation as Markdown.
 * @param {Conversation} conversation
 */
export function asMarkdown(conversation) {
  const parts = [`# ${conversation.title}`];
  for (const turn of shownTurns(conversation)) {
    parts.push(turn.role === "user" ? "## Question" : "## Answer", turn.text.trim());
  }
  return `${parts.join("\n\n")}\n`;
}
