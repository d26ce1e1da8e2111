/** Export and import of conversations as files. */

import { asMarkdown, isConversation } from "./conversation.js";
import { element } from "./dom.js";

/** @typedef {import("./conversation.js").Conversation} Conversation */

/** @param {Conversation} conversation its shown turns are saved */
export function saveMarkdown(conversation) {
  saveFile(`${fileName(conversation.title)}.md`, "text/markdown", asMarkdown(conversation));
}

/** @param {Conversation} conversation saved with all versions of all turns */
export function saveJson(conversation) {
  saveFile(`${fileName(conversation.title)}.json`, "application/json", `${JSON.stringify(conversation, null, 2)}\n`);
}

/** @param {Conversation[]} conversations */
export function saveAll(conversations) {
  saveFile("conversations.json", "application/json", `${JSON.stringify({ conversations }, null, 2)}\n`);
}

/**
 * The conversations of a file written by `saveJson` or `saveAll`; none for any other file.
 * @param {File} file
 * @returns {Promise<Conversation[]>}
 */
export async function readConversations(file) {
  try {
    const value = JSON.parse(await file.text());
    return (Array.isArray(value.conversations) ? value.conversations : [value]).filter(isConversation);
  } catch {
    return [];
  }
}

/** @param {string} title @returns {string} letters, digits and hyphens */
function fileName(title) {
  const name = title.normalize("NFKD").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "");
  return name.slice(0, 60) || "conversation";
}

/** @param {string} name @param {string} type @param {string} text */
function saveFile(name, type, text) {
  const address = URL.createObjectURL(new Blob([text], { type: `${type};charset=utf-8` }));
  const link = element("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
