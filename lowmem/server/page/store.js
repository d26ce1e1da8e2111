/**
 * Browser storage of conversations, drafts and settings. Each conversation is a separate entry, so that two tabs do not
 * overwrite each other's changes.
 */

import { isConversation } from "./conversation.js";

/** @typedef {import("./conversation.js").Conversation} Conversation */

const CHAT = "lowmem.chat.";
const DRAFT = "lowmem.draft.";
const KEY = "lowmem.key";

/** The storage is full or disabled. */
export class StorageError extends Error {}

/** The stored data, synchronized with other tabs. */
export class Store {
  constructor() {
    /** @type {Map<string, Conversation>} */
    this.conversations = new Map();
    /** @type {(id: string|null) => void} called with the id of a conversation that another tab changed */
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
   * Save a conversation; throws StorageError if that fails.
   * @param {Conversation} conversation
   */
  save(conversation) {
    this.conversations.set(conversation.id, conversation);
    write(CHAT + conversation.id, JSON.stringify(conversation));
  }

  /**
   * Delete a conversation and its draft.
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
 * The draft of a question; "new" is the draft of a new conversation.
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
    // An unsaved draft is still on the screen.
  }
}

/**
 * A stored value by name; undefined if it is not stored.
 * @param {string} name
 * @returns {any}
 */
export function readValue(name) {
  return parse(read(`lowmem.${name}`));
}

/** @param {string} name @param {any} value undefined deletes it */
export function writeValue(name, value) {
  try {
    write(`lowmem.${name}`, value === undefined ? null : typeof value === "string" ? value : JSON.stringify(value));
  } catch {
    // The value lasts as long as the page is open.
  }
}

/** The server's API key, kept until this tab is closed and separate from the conversations. */
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
    // The page will ask for it again.
  }
}

/** @param {string} name @param {string|null} text null deletes it */
function write(name, text) {
  try {
    if (text === null) localStorage.removeItem(name);
    else localStorage.setItem(name, text);
  } catch (error) {
    throw new StorageError(
      "The browser cannot save conversations: its storage is full or disabled. Export and delete some.",
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
