/** One streaming answer: its pieces, its figures, and how it ended. It continues while another chat is shown. */

import { ServerError, streamAnswer } from "./api.js";
import { Speaker } from "./speaker.js";

/**
 * @typedef {import("./conversation.js").Conversation} Conversation
 * @typedef {import("./conversation.js").Turn} Turn
 * @typedef {{role: string, content: string}} Message
 */

let leaving = -Infinity; // time of the last beforeunload event: browsers drop connections before they report it
addEventListener("beforeunload", () => {
  leaving = performance.now();
});

const LETTERS = 3; // average length of a token: longer in prose, shorter in code

export class Answer {
  /**
   * @param {Conversation} conversation
   * @param {Turn} turn of the answer
   * @param {{onPiece: (answer: Answer) => void, onEnd: (answer: Answer) => void}} listeners
   */
  constructor(conversation, turn, listeners) {
    this.conversation = conversation;
    this.turn = turn;
    this.listeners = listeners;
    this.controller = new AbortController();
    this.speaker = new Speaker();
    this.started = performance.now();
    this.first = 0; // time of the first piece
    this.latest = 0; // time of the latest piece
    this.pieces = 0;
    this.status = 0; // HTTP status of a refusal
  }

  /** Tokens per second so far, if each piece is a token; 0 before the second piece. */
  get rate() {
    return this.pieces > 1 ? ((this.pieces - 1) * 1000) / Math.max(this.latest - this.first, 1) : 0;
  }

  /**
   * Send the request and read the answer to its end; never throws.
   * @param {Record<string, any>} body of the request
   */
  async run(body) {
    const { turn } = this;
    /** @type {import("./api.js").Usage|null} */
    let usage = null;
    try {
      for await (const piece of this.#pieces(body)) {
        usage = piece.usage ?? usage;
        if (piece.finish) turn.finish = piece.finish;
        if (!piece.text) continue;
        this.latest = performance.now();
        this.first ||= this.latest;
        this.pieces += 1;
        turn.text += this.pieces === 1 ? piece.text.replace(/^\n+/, "") : piece.text;
        this.listeners.onPiece(this);
      }
      turn.state = "done";
    } catch (error) {
      this.#failed(error);
    }
    this.#measure(usage);
    this.listeners.onEnd(this);
  }

  /**
   * The pieces. If the messages exceed the context, more exchanges at the start are dropped: one, then as many again
   * as have been dropped.
   * @param {Record<string, any>} body
   * @returns {AsyncGenerator<import("./api.js").Piece>}
   */
  async *#pieces(body) {
    for (let left = this.turn.left ?? 0; ; ) {
      const messages = withoutFirst(body.messages, left);
      try {
        this.turn.left = left;
        yield* streamAnswer({ ...body, messages }, this.controller.signal);
        return;
      } catch (error) {
        const questions = messages.filter(({ role }) => role === "user").length;
        if (!(error instanceof ServerError) || error.code !== "context_length_exceeded" || questions < 2) throw error;
        left += Math.min(left || 1, questions - 1);
      }
    }
  }

  /** Stop the answer and keep its text. The server stops generating when the connection closes. */
  stop() {
    this.controller.abort();
  }

  /** @param {unknown} error */
  #failed(error) {
    const { turn } = this;
    if (this.controller.signal.aborted || performance.now() - leaving < 2000) {
      if (turn.state === "streaming") turn.state = this.controller.signal.aborted ? "stopped" : "interrupted";
      return;
    }
    turn.state = turn.text ? "interrupted" : "failed";
    turn.problem = error instanceof ServerError ? error.message : "The answer of the server could not be read.";
    this.status = error instanceof ServerError ? error.status : 0;
  }

  /** @param {import("./api.js").Usage|null} usage */
  #measure(usage) {
    if (!this.first) return;
    const tokens = usage?.completion_tokens ?? this.pieces;
    const seconds = Math.max(this.latest - this.first, 1) / 1000;
    this.turn.figures = {
      exact: usage !== null,
      prompt: usage?.prompt_tokens ?? 0,
      cached: usage?.prompt_tokens_details?.cached_tokens ?? 0,
      tokens,
      first: (this.first - this.started) / 1000,
      rate: tokens > 1 ? (tokens - 1) / seconds : 0,
    };
  }
}

/**
 * How many exchanges at the start to drop, so that an answer fits: as many as last time, unless the rest fills three
 * quarters of the context. Then it is cut to half of the context, so that most requests begin like the previous one
 * and the server can reuse its KV cache.
 * @param {Message[]} messages
 * @param {number} before exchanges that were dropped last time
 * @param {number} context tokens; 0 if unknown
 */
export function exchangesToLeave(messages, before, context) {
  const most = messages.filter(({ role }) => role === "user").length - 1;
  let left = Math.min(before, most);
  const tokens = () => withoutFirst(messages, left).reduce((sum, one) => sum + one.content.length, 0) / LETTERS;
  if (!context || tokens() <= context * 0.75) return left;
  while (left < most && tokens() > context / 2) left += 1;
  return left;
}

/**
 * The messages without their first exchanges, but with the system text.
 * @param {Message[]} messages
 * @param {number} exchanges pairs of a question and its answer
 */
function withoutFirst(messages, exchanges) {
  const questions = messages.flatMap(({ role }, index) => (role === "user" ? [index] : []));
  if (!exchanges) return messages;
  return [...messages.filter(({ role }) => role === "system"), ...messages.slice(questions[exchanges])];
}
