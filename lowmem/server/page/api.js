/** Requests to the server, which all go to the page's own origin, and error messages in words. */

import { readKey } from "./store.js";

/**
 * @typedef {{
 *   model: string, label: string, plan: string, device: string, kernel: string, context: number,
 *   weight_bytes: number, need_bytes: number, tokens_per_second: number, busy: boolean, running: number,
 *   slots: number, queue: number,
 *   memory: {host: number, host_peak: number, card: number, card_peak: number}
 * }} Status need_bytes: planned memory, 0 without a plan
 * @typedef {{prompt_tokens: number, completion_tokens: number,
 *   prompt_tokens_details?: {cached_tokens?: number}}} Usage
 * @typedef {{text: string, finish: string|null, usage: Usage|null}} Piece a piece of an answer
 * @typedef {{blocks: any[], settled: number, settled_blocks: number}} Rendered see nodes.js
 */

/** A failed request. `status`: of HTTP, 0 if the connection failed. `code`: OpenAI's. */
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
 * Request an answer and yield its pieces. Throws ServerError if the server refuses, cannot be reached or closes the
 * connection early, and AbortError if `signal` is aborted.
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
 * Render a Markdown text as a tree.
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
 * The id of the served model.
 * @returns {Promise<string>}
 */
export async function readModel() {
  const models = await (await request("/v1/models", {})).json();
  return String(models.data?.[0]?.id ?? "");
}

/**
 * A successful response; throws ServerError otherwise.
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

/** @param {Response} response @returns {Promise<ServerError>} the reason of a refusal */
async function refusal(response) {
  const { status } = response;
  let said = "";
  let code = "";
  try {
    const { error } = await response.json();
    said = sentence(String(error.message ?? ""));
    code = String(error.code ?? "");
  } catch {
    // The response comes from another server, such as a proxy: use its status.
  }
  if (status === 401) said = "The server requires an API key.";
  else if (status === 429) said = `The server is busy with other requests. ${said}`.trim();
  else if (status === 503) said = `The server accepts no requests at the moment. ${said}`.trim();
  return new ServerError(status, said || `The server answered with status ${status}.`, code);
}

/** @param {string} text @returns {string} with a full stop */
function sentence(text) {
  return !text || /[.!?]$/.test(text) ? text : `${text}.`;
}

/**
 * The data of server-sent events, event by event.
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
