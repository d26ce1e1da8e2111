/** The chat page: connects user actions with conversations, answers and the screen. */

import { Answer, exchangesToLeave } from "./answer.js";
import { readModel } from "./api.js";
import { Composer } from "./composer.js";
import { addTurn, chooseVersion, newConversation, requestMessages, ROOT, shownTurns } from "./conversation.js";
import { announce, byId, isTouched, notify } from "./dom.js";
import { readConversations, saveAll, saveJson, saveMarkdown } from "./files.js";
import { isDark, requestSettings, setTheme, SettingsDialog } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { StatusView } from "./status.js";
import { readKey, StorageError, Store, writeKey } from "./store.js";
import { Thread } from "./thread.js";

/**
 * @typedef {import("./conversation.js").Conversation} Conversation
 * @typedef {import("./conversation.js").Turn} Turn
 */

const KEPT_EVERY = 500; // milliseconds between two saves of a streaming answer

class App {
  constructor() {
    this.store = new Store();
    /** @type {Conversation|null} null: a new one without a question */
    this.current = null;
    /** @type {Map<string, Answer>} the streaming answer of each conversation, by its id */
    this.answers = new Map();
    this.savedAt = 0;
    this.settings = new SettingsDialog(() => this.#showTheme());
    this.sidebar = new Sidebar({
      rename: (id, title) => this.#rename(id, title), remove: (id) => this.#remove(id),
    });
    this.thread = new Thread({
      retry: (turn) => this.#retry(turn),
      edit: (turn, text) => this.#ask(text, turn.parent),
      choose: (turn, step) => this.#choose(turn, step),
      answerOf: (turn) => [...this.answers.values()].find((answer) => answer.turn.id === turn.id) ?? null,
      context: () => this.status.status?.context ?? 0,
    });
    this.composer = new Composer({
      send: (text) => this.#send(text), stop: () => this.#stop(), editLast: () => this.thread.editLast(),
    });
    /** @type {(() => void)[]} actions waiting for the API key */
    this.afterKey = [];
    this.status = new StatusView({ onBack: () => this.thread.mend(), onKey: () => this.#askForKey() });
    this.store.onOtherTab = (id) => this.#otherTab(id);
    this.#listen();
    this.#showTheme();
    this.#open(idInAddress());
  }

  #listen() {
    addEventListener("hashchange", () => this.#open(idInAddress()));
    addEventListener("pagehide", () => this.#leave());
    addEventListener("keydown", (event) => this.#key(event));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#showTheme());
    byId("new-chat").addEventListener("click", () => this.#new());
    byId("new-chat-top").addEventListener("click", () => this.#new());
    byId("toggle-theme").addEventListener("click", () => {
      setTheme(isDark() ? "light" : "dark", () => this.#showTheme());
    });
    for (const button of document.querySelectorAll("[data-opens=settings]")) {
      button.addEventListener("click", () => this.settings.open());
    }
    for (const button of document.querySelectorAll("[data-opens=shortcuts]")) {
      button.addEventListener("click", () => byId("shortcuts").showModal());
    }
    for (const button of document.querySelectorAll("[data-example]")) {
      button.addEventListener("click", () => this.#send(/** @type {HTMLElement} */ (button).dataset.example ?? ""));
    }
    for (const dialog of /** @type {NodeListOf<HTMLDialogElement>} */ (document.querySelectorAll("dialog"))) {
      dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // a click on the backdrop
      dialog.querySelector("[data-closes]")?.addEventListener("click", () => dialog.close());
    }
    byId("export-markdown").addEventListener("click", () => this.#export(saveMarkdown));
    byId("export-json").addEventListener("click", () => this.#export(saveJson));
    byId("export-all").addEventListener("click", () => saveAll(this.store.list()));
    byId("load").addEventListener("click", () => byId("load-file").click());
    byId("load-file").addEventListener("change", () => this.#load());
    byId("delete-all").addEventListener("click", () => this.#removeAll());
    document.querySelector(".skip")?.addEventListener("click", (event) => {
      event.preventDefault(); // the address holds the id of the conversation
      this.composer.focus();
    });
    byId("key-dialog").addEventListener("close", () => {
      for (const act of this.afterKey.splice(0)) if (readKey()) act();
      this.status.refresh();
    });
    byId("key-form").addEventListener("submit", (/** @type {Event} */ event) => {
      event.preventDefault();
      writeKey(byId("key").value.trim());
      byId("key").value = "";
      byId("key-dialog").close();
    });
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    if (event.defaultPrevented || event.isComposing) return;
    const command = event.ctrlKey || event.metaKey;
    if (event.key === "Escape" && event.shiftKey) this.composer.focus();
    else if (event.key === "Escape" && !document.querySelector("dialog[open], :popover-open")) this.#stop();
    else if (command && event.shiftKey && event.key.toLowerCase() === "o") this.#new();
    else if (command && event.key === "/") byId("shortcuts").showModal();
    else return;
    event.preventDefault();
  }

  /** @param {string|null} id of the conversation to show; null or an unknown id starts a new one */
  #open(id) {
    this.current = (id && this.store.conversations.get(id)) || null;
    if (id && !this.current) history.replaceState(null, "", location.pathname);
    this.composer.open(this.current?.id ?? "new");
    this.#show();
    if (!isTouched()) this.composer.focus(); // would open the on-screen keyboard
    else byId("scroller").focus({ preventScroll: true });
  }

  #new() {
    if (location.hash) location.hash = "";
    history.replaceState(null, "", location.pathname);
    this.#open(null);
    this.composer.focus();
  }

  /** Update the whole screen. */
  #show() {
    const title = this.current?.title ?? "New conversation";
    byId("title").textContent = title;
    document.title = this.current ? `${title} – lowmem` : "lowmem";
    byId("export").disabled = !this.current;
    this.composer.setRunning(this.answers.has(this.current?.id ?? ""));
    this.sidebar.show(this.store.list(), this.current?.id ?? null, new Set(this.answers.keys()));
    this.thread.show(this.current);
  }

  #showTheme() {
    const label = isDark() ? "Light theme" : "Dark theme";
    const button = byId("toggle-theme");
    button.setAttribute("aria-label", label);
    button.title = label;
    button.querySelector("use").setAttribute("href", isDark() ? "#icon-sun" : "#icon-moon");
  }

  /** @param {string} text @returns {boolean} whether it was accepted */
  #send(text) {
    const last = this.current && shownTurns(this.current).at(-1);
    return this.#ask(text, last?.id ?? ROOT);
  }

  /** Add a question after `parent`, and answer it. @param {string} text @param {string} parent */
  #ask(text, parent) {
    if (this.answers.has(this.current?.id ?? "")) {
      notify("Stop the current answer first.");
      return false;
    }
    const conversation = this.current ?? newConversation();
    const question = addTurn(conversation, parent, "user", text);
    this.#answer(conversation, question);
    if (!this.current) {
      this.current = conversation;
      this.composer.draft = conversation.id;
      history.pushState(null, "", `#/${conversation.id}`);
    }
    this.#show();
    this.thread.toEnd();
    this.composer.focus();
    return true;
  }

  /** Another answer to the same question. @param {Turn} turn */
  #retry(turn) {
    const conversation = this.current;
    const question = conversation?.turns.find((one) => one.id === turn.parent);
    if (!conversation || !question || this.answers.has(conversation.id)) return;
    if (!turn.text) conversation.turns = conversation.turns.filter((one) => one !== turn); // nothing to keep
    this.#answer(conversation, question);
    this.#show();
    this.thread.toEnd();
    this.composer.focus();
  }

  /** @param {Conversation} conversation @param {Turn} question */
  async #answer(conversation, question) {
    const turn = addTurn(conversation, question.id, "assistant", "");
    const answer = new Answer(conversation, turn, {
      onPiece: (one) => this.#grown(one), onEnd: (one) => this.#ended(one),
    });
    this.answers.set(conversation.id, answer);
    this.#keep(conversation);
    announce("The question was sent.");
    this.status.setBusy(true);
    const { settings } = this.settings;
    const model = this.status.status?.model ?? (await readModel().catch(() => "")); // the request for the answer will report the error
    const messages = requestMessages(conversation, question, settings.system);
    const before = shownTurns(conversation).findLast((one) => one.role === "assistant" && one !== turn)?.left ?? 0;
    turn.left = exchangesToLeave(messages, before, this.status.status?.context ?? 0);
    turn.limit = settings.max_tokens;
    await answer.run({ model, messages, ...requestSettings(settings) });
  }

  /** @param {Answer} answer */
  #grown(answer) {
    if (answer.conversation === this.current) {
      this.thread.grow(answer);
      answer.speaker.say(answer.turn.text);
    }
    if (performance.now() - this.savedAt > KEPT_EVERY) this.#keep(answer.conversation);
  }

  /** @param {Answer} answer */
  #ended(answer) {
    const { conversation, turn } = answer;
    this.answers.delete(conversation.id);
    this.status.setBusy(this.answers.size > 0);
    if (!this.store.conversations.has(conversation.id)) return; // deleted in the meantime
    conversation.updated = Date.now();
    this.#keep(conversation);
    if (conversation === this.current) {
      answer.speaker.say(turn.text, true);
      announce(turn.problem ?? (turn.state === "stopped" ? "Stopped." : "The answer is complete."));
    }
    this.#show();
    if (answer.status === 401) this.#askForKey(() => conversation === this.current && this.#retry(turn));
  }

  #stop() {
    this.answers.get(this.current?.id ?? "")?.stop();
  }

  /** @param {Turn} turn @param {number} step */
  #choose(turn, step) {
    if (!this.current || this.answers.has(this.current.id)) return;
    chooseVersion(this.current, turn, step);
    this.#keep(this.current);
    this.#show();
  }

  /** @param {string} id @param {string} title */
  #rename(id, title) {
    const conversation = this.store.conversations.get(id);
    if (conversation && title !== conversation.title) {
      conversation.title = title;
      conversation.named = true;
      this.#keep(conversation);
    }
    this.#show();
  }

  /** @param {string} id */
  #remove(id) {
    const conversation = this.store.conversations.get(id);
    if (!conversation) return;
    this.answers.get(id)?.stop();
    this.store.remove(id);
    const shown = conversation === this.current;
    if (shown) {
      history.replaceState(null, "", location.pathname);
      this.current = null;
      this.composer.draft = "new";
    }
    this.#show();
    notify(`Deleted “${conversation.title}”.`, {
      label: "Undo",
      act: () => {
        this.#keep(conversation);
        if (shown) location.hash = `#/${id}`;
        this.#show();
        this.composer.focus();
      },
    });
  }

  #removeAll() {
    const all = this.store.list();
    byId("settings").close();
    if (!all.length) return;
    for (const { id } of all) {
      this.answers.get(id)?.stop();
      this.store.remove(id);
    }
    this.composer.draft = "new";
    this.#new();
    notify(`Deleted ${all.length} ${all.length === 1 ? "conversation" : "conversations"}.`, {
      label: "Undo",
      act: () => {
        for (const one of all) this.#keep(one);
        this.#show();
      },
    });
  }

  /** Add the conversations of an exported file; existing ones are kept. */
  async #load() {
    const field = byId("load-file");
    const found = await readConversations(field.files[0]);
    field.value = "";
    const fresh = found.filter(({ id }) => !this.store.conversations.has(id));
    for (const one of fresh) this.#keep(one);
    byId("settings").close();
    this.#show();
    const known = found.length - fresh.length;
    if (!found.length) notify("This file contains no exported conversations.");
    else notify(`Conversations added: ${fresh.length}${known ? `; ${known} already existed` : ""}.`);
  }

  /** @param {(conversation: Conversation) => void} save */
  #export(save) {
    byId("export-menu").hidePopover();
    if (this.current) save(this.current);
  }

  /** Save a conversation; shows a message if that fails. @param {Conversation} conversation */
  #keep(conversation) {
    this.savedAt = performance.now();
    try {
      this.store.save(conversation);
    } catch (error) {
      if (!(error instanceof StorageError)) throw error;
      if (!this.storageFull) notify(error.message);
      this.storageFull = true;
    }
  }

  /** The page is closing: save streaming answers as far as they have arrived. */
  #leave() {
    for (const answer of this.answers.values()) {
      answer.turn.state = "interrupted";
      answer.stop();
      this.#keep(answer.conversation);
    }
  }

  /** @param {string|null} id of a conversation that another tab changed; null: all */
  #otherTab(id) {
    if (this.current && (id === null || id === this.current.id) && !this.answers.has(this.current.id)) {
      this.current = this.store.conversations.get(this.current.id) ?? null;
    }
    this.#show();
  }

  /** @param {() => void} [act] what to do with the key */
  #askForKey(act) {
    if (act) this.afterKey.push(act);
    const dialog = byId("key-dialog");
    if (!dialog.open) dialog.showModal();
  }
}

/** @returns {string|null} the id of the conversation in the page's address */
function idInAddress() {
  return location.hash.startsWith("#/") ? location.hash.slice(2) : null;
}

new App();
