// Text generation, the loop of fbiedge/generate.py: an async generator of events that whoever shows them drives.

import { PENALTY_WINDOW, sample } from "./sampling.js";
import { DetokenizeStream } from "./tokenizer.js";

/** Tokens of one prefill step, between two looks at `cancelled`. */
export const CHUNK = 128;

/**
 * Why a text ended. end: the model ended it; length: maxTokens; context: the cache is full; cancelled: the stop button.
 * @typedef {"end" | "length" | "context" | "cancelled"} FinishReason
 *
 * @typedef {object} GenerationOptions
 * @property {number} maxTokens  0: until the model ends its text or the context is full
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
 *
 * @typedef {{type: "prompt", done: number, total: number} | {type: "piece", text: string} | GenerationStats} Event
 */

/**
 * Continue `promptIds` until one of the `ends`, a limit of `options`, or `cancelled()`. What the session's cache shares
 * with the prompt is not run again.
 * @param {import("./session.js").Session} session
 * @param {import("./tokenizer.js").Tokenizer} tokenizer
 * @param {number[]} promptIds
 * @param {GenerationOptions} options
 * @param {Set<number>} ends
 * @param {() => boolean} cancelled
 * @returns {AsyncGenerator<Event>}
 */
export async function* generate(session, tokenizer, promptIds, options, ends, cancelled) {
  const started = performance.now();
  const detokenizer = new DetokenizeStream(tokenizer, promptIds);
  /** @type {number[]} */
  const generatedIds = [];
  const cachedTokens = await session.reuse(promptIds);
  /** @type {Float32Array | null} */
  let logits = null;
  for (let start = cachedTokens; start < promptIds.length && !cancelled(); start += CHUNK) {
    logits = await session.forward(promptIds.slice(start, start + CHUNK));
    yield { type: "prompt", done: session.position, total: promptIds.length };
  }
  const prefilled = performance.now();
  /** @type {FinishReason} */
  let finishReason = "cancelled";
  let decodeSteps = 0;
  while (logits !== null && !cancelled() && session.position >= promptIds.length) {
    const recent = [...promptIds.slice(-PENALTY_WINDOW), ...generatedIds.slice(-PENALTY_WINDOW)];
    const id = sample(logits, recent, options.sampling);
    if (ends.has(id)) {
      finishReason = "end";
      break;
    }
    generatedIds.push(id);
    const text = detokenizer.push(id);
    if (text) yield { type: "piece", text };
    if (generatedIds.length === options.maxTokens) {
      finishReason = "length";
      break;
    }
    if (session.position === session.capacity) {
      finishReason = "context";
      break;
    }
    logits = await session.forward([id]);
    decodeSteps += 1;
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
