/** What is asked of the server, and what went wrong in words. Every request goes to the page's own origin. */

import { readKey } from "./store.js";

/**
 * @typedef {{
 *   model: string, label: string, plan: string, device: string, kernel: string, context: number,
 *   weight_bytes: number, need_bytes: number, tokens_per_second: number, busy: boolean, queue: number,
 *   memory: {host: number, host_peak: number, card: number, card_peak: number}
 * }} Status need_bytes: what was planned; 0 where nothing was
 * @typedef {{prompt_tokens: number, completion_tokens: number,
 *   prompt_tokens_details?: {cached_tokens?: number}}} Usage
 * @typedef {{text: string, finish: string|null, usage: Usage|null}} Piece of an answer
 * @typedef {{blocks: any[], settled: number, settled_blocks: number}} Rendered see nodes.js
 */

/** A refusal: `status` of HTTP, or 0 when the server was not reached or left in the middle; `code`: OpenAI's. */
export class ServerError extends Error {
  /** @param {number} status @param {string} words @param {string} [code] */
  constructor(status, words, code = "") {
    super(words);
    this.status = status;
    this.code = code;
  }
}

const GONE = "The server cannot be reached. Is lowmem serve still running?";
const LOST = "The connection was lost before the answer was complete.";

/**
 * Ask for an answer and give its pieces as they come. Ends with ServerError where the server refuses, is not
 * there or leaves before the answer is complete; with AbortError when `signal` says so.
 * @param {Record<string, any>} body
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<Piece>}
 */
export async function* streamAnswer(body, signal) {
  const response = await request("/v1/chat/completions", {
    method: "POST", body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }), signal,
  });
  let complete = false;
  for await (const data of serverSentData(response, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(0, sentence(String(chunk.error.message ?? LOST)));
    const choice = chunk.choices?.[0];
    complete ||= Boolean(choice?.finish_reason);
    yield {
      text: String(choice?.delta?.content ?? ""), finish: choice?.finish_reason ?? null, usage: chunk.usage ?? null,
    };
  }
  if (!complete) throw new ServerError(0, LOST);
}

/**
 * The tree of a markdown text.
 * @param {string} text
 * @returns {Promise<Rendered>}
 */
export async function renderMarkdown(text) {
  return (await request("/page/render", { method: "POST", body: JSON.stringify({ text }) })).json();
}

/** @returns {Promise<Status>} */
export async function readStatus() {
  return (await request("/page/status", {})).json();
}

/**
 * The id of the model that the server has.
 * @returns {Promise<string>}
 */
export async function readModel() {
  const models = await (await request("/v1/models", {})).json();
  return String(models.data?.[0]?.id ?? "");
}

/**
 * A response that is not a refusal.
 * @param {string} path
 * @param {RequestInit} options
 */
async function request(path, options) {
  const key = readKey();
  /** @type {Record<string, string>} */
  const headers = options.body ? { "Content-Type": "application/json" } : {};
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ServerError(0, GONE);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** @param {Response} response @returns {Promise<ServerError>} why the server refuses */
async function refusal(response) {
  const { status } = response;
  let said = "";
  let code = "";
  try {
    const { error } = await response.json();
    said = sentence(String(error.message ?? ""));
    code = String(error.code ?? "");
  } catch {
    // Not from the model's server: the status has to do.
  }
  if (status === 401) said = "The server asks for its API key.";
  else if (status === 429) said = `The server is busy with other questions. ${said}`.trim();
  else if (status === 503) said = `The server takes no questions at the moment. ${said}`.trim();
  return new ServerError(status, said || `The server answered with status ${status}.`, code);
}

/** @param {string} text @returns {string} with a full stop */
function sentence(text) {
  return !text || /[.!?]$/.test(text) ? text : `${text}.`;
}

/**
 * The data of server-sent events, one event at a time.
 * @param {Response} response
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<string>}
 */
async function* serverSentData(response, signal) {
  const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
  const decoder = new TextDecoder();
  let waiting = "";
  try {
    while (true) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (signal.aborted) throw error;
        throw new ServerError(0, LOST);
      }
      waiting += part.done ? decoder.decode() : decoder.decode(part.value, { stream: true });
      const events = waiting.split(/\r?\n\r?\n/);
      waiting = events.pop() ?? "";
      for (const event of events) {
        const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (data.length) yield data.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
      if (part.done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
