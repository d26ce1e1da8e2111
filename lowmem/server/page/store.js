/**
 * What the browser keeps: conversations, drafts of questions, settings. Each conversation is an entry of its own,
 * so that two tabs do not undo each other's work.
 */

import { isConversation } from "./conversation.js";

/** @typedef {import("./conversation.js").Conversation} Conversation */

const CHAT = "lowmem.chat.";
const DRAFT = "lowmem.draft.";
const KEY = "lowmem.key";

/** The storage refused: it is full, or the browser allows none. */
export class StorageError extends Error {}

/** All that is kept, and what changes in other tabs. */
export class Store {
  constructor() {
    /** @type {Map<string, Conversation>} */
    this.conversations = new Map();
    /** @type {(id: string|null) => void} called with a conversation's id when another tab changed it */
    this.onOtherTab = () => {};
    for (const name of storedNames()) {
      if (name.startsWith(CHAT)) this.#read(name);
    }
    addEventListener("storage", (event) => {
      if (event.key === null) this.conversations.clear();
      else if (!event.key.startsWith(CHAT)) return;
      else this.#read(event.key);
      this.onOtherTab(event.key?.slice(CHAT.length) ?? null);
    });
  }

  /** Newest first. */
  list() {
    return [...this.conversations.values()].sort((a, b) => b.updated - a.updated);
  }

  /**
   * Keep a conversation as it is now; StorageError where that is not possible.
   * @param {Conversation} conversation
   */
  save(conversation) {
    this.conversations.set(conversation.id, conversation);
    write(CHAT + conversation.id, JSON.stringify(conversation));
  }

  /**
   * Forget a conversation and its draft.
   * @param {string} id
   */
  remove(id) {
    this.conversations.delete(id);
    write(CHAT + id, null);
    write(DRAFT + id, null);
  }

  /** @param {string} name of an entry */
  #read(name) {
    const value = parse(read(name));
    if (isConversation(value) && CHAT + value.id === name) this.conversations.set(value.id, value);
    else if (read(name) === null) this.conversations.delete(name.slice(CHAT.length));
  }
}

/**
 * A question that is being written; "new" is that of no conversation yet.
 * @param {string} id
 */
export function readDraft(id) {
  return read(DRAFT + id) ?? "";
}

/** @param {string} id @param {string} text */
export function writeDraft(id, text) {
  try {
    write(DRAFT + id, text || null);
  } catch {
    // A draft that is not kept is still on the screen.
  }
}

/**
 * A small value by name, as it was kept; undefined if there is none.
 * @param {string} name
 * @returns {any}
 */
export function readValue(name) {
  return parse(read(`lowmem.${name}`));
}

/** @param {string} name @param {any} value undefined: forget it */
export function writeValue(name, value) {
  try {
    write(`lowmem.${name}`, value === undefined ? null : typeof value === "string" ? value : JSON.stringify(value));
  } catch {
    // It holds for as long as the page is open.
  }
}

/** The server's API key: for as long as this tab is open, and never beside the conversations. */
export function readKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

/** @param {string} key */
export function writeKey(key) {
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch {
    // Then it is asked for again.
  }
}

/** @param {string} name @param {string|null} text null: forget it */
function write(name, text) {
  try {
    if (text === null) localStorage.removeItem(name);
    else localStorage.setItem(name, text);
  } catch (error) {
    throw new StorageError(
      "The browser keeps no more conversations: its storage is full or switched off. Export and delete some.",
      { cause: error },
    );
  }
}

/** @param {string} name */
function read(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

function storedNames() {
  try {
    return Object.keys(localStorage);
  } catch {
    return [];
  }
}

/** @param {string|null} text @returns {any} */
function parse(text) {
  if (text === null) return undefined;
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}
