// Text generation, the loop of fbiedge/generate.py: an async generator of events that whoever shows them drives.

import { PENALTY_WINDOW, sample } from "./sampling.js";
import { DetokenizeStream } from "./tokenizer.js";

/** Tokens of one prefill step, between two looks at `cancelled`. */
export const CHUNK = 128;

/**
 * Why a text ended. end: the model ended it; length: maxTokens; context: nothing of the prompt is left in the cache;
 * cancelled: the stop button.
 * @typedef {"end" | "length" | "context" | "cancelled"} FinishReason
 *
 * @typedef {object} GenerationOptions
 * @property {number} maxTokens  0: until the model ends its text
 * @property {import("./sampling.js").SamplingOptions} sampling
 *
 * @typedef {object} GenerationStats
 * @property {"stats"} type
 * @property {number} promptTokens
 * @property {number} cachedTokens  of the prompt, found in the cache and not run again
 * @property {number[]} generatedIds  without the token that ended the text
 * @property {number} prefillSeconds  until the first logits
 * @property {number} decodeSeconds
 * @property {number} decodeSteps
 * @property {FinishReason} finishReason
 * @property {number} [forgottenTurns]  of the conversation, for want of room
 *
 * @typedef {{type: "prompt", done: number, total: number} | {type: "piece", text: string} | GenerationStats} Event
 */

/**
 * Continue `promptIds` until one of the `ends`, a limit of `options`, or `cancelled()`. What the session's cache shares
 * with the prompt is not run again. Where the cache is full, it forgets the older half but for the first `keep` tokens,
 * and runs the rest again: its keys and values held what is forgotten.
 * @param {import("./session.js").Session} session
 * @param {import("./tokenizer.js").Tokenizer} tokenizer
 * @param {number[]} promptIds
 * @param {GenerationOptions} options
 * @param {Set<number>} ends
 * @param {number} keep
 * @param {() => boolean} cancelled
 * @returns {AsyncGenerator<Event>}
 */
export async function* generate(session, tokenizer, promptIds, options, ends, keep, cancelled) {
  const { capacity } = session;
  const started = performance.now();
  const detokenizer = new DetokenizeStream(tokenizer, promptIds);
  let tokens = [...promptIds]; // that the next one comes after
  /** @type {number[]} */
  const generatedIds = [];
  const cachedTokens = await session.reuse(promptIds);
  let logits = yield* run(session, promptIds, cancelled);
  const prefilled = performance.now();
  /** @type {FinishReason} */
  let finishReason = "cancelled";
  let decodeSteps = 0;
  while (logits !== null && !cancelled()) {
    const id = sample(logits, tokens.slice(-PENALTY_WINDOW), options.sampling);
    if (ends.has(id)) {
      finishReason = "end";
      break;
    }
    generatedIds.push(id);
    tokens.push(id);
    yield { type: "piece", text: detokenizer.push(id) };
    // A model that never ends its text must end somewhere: where its answer alone fills the context.
    if (generatedIds.length === (options.maxTokens || capacity)) {
      finishReason = options.maxTokens ? "length" : "context";
      break;
    }
    if (session.position < capacity) {
      logits = await session.forward([id]);
      decodeSteps += 1;
      continue;
    }
    const kept = Math.min(keep, Math.floor(capacity / 2));
    tokens = [...tokens.slice(0, kept), ...tokens.slice(-Math.floor((capacity - kept + 1) / 2))];
    await session.reuse(tokens);
    logits = yield* run(session, tokens, cancelled);
  }
  const rest = detokenizer.flush();
  if (rest) yield { type: "piece", text: rest };
  yield {
    type: "stats",
    promptTokens: promptIds.length,
    cachedTokens,
    generatedIds,
    prefillSeconds: (prefilled - started) / 1000,
    decodeSeconds: (performance.now() - prefilled) / 1000,
    decodeSteps,
    finishReason,
  };
}

/**
 * Run what the cache lacks of `ids` -> logits for the token after them; null where that was cancelled.
 * @param {import("./session.js").Session} session
 * @param {number[]} ids
 * @param {() => boolean} cancelled
 * @returns {AsyncGenerator<Event, Float32Array | null>}
 */
async function* run(session, ids, cancelled) {
  /** @type {Float32Array | null} */
  let logits = null;
  while (session.position < ids.length) {
    if (cancelled()) return null;
    logits = await session.forward(ids.slice(session.position, session.position + CHUNK));
    yield { type: "prompt", done: session.position, total: ids.length };
  }
  return logits;
}
