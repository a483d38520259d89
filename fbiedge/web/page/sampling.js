// From logits to the next token, step by step as fbiedge/sampling.py:
//
//     repetition penalty -> temperature -> top-k -> top-p -> min-p -> draw
//
// Temperature 0 is greedy: the largest logit after the penalty, the lowest id among equals. Every truncation keeps at
// least the most likely token and breaks ties in favour of the lower id.

/**
 * How to pick a token, with the names of SamplingOptions in Python.
 * @typedef {object} SamplingOptions
 * @property {number} temperature  0 is greedy
 * @property {number} top_k  0 keeps all
 * @property {number} top_p  1 keeps all
 * @property {number} min_p  0 keeps all
 * @property {number} repetition_penalty  1 is none
 */

/** The repetition penalty looks this many tokens back. */
export const PENALTY_WINDOW = 64;

// Up to so many tokens are found by inserting them into a sorted list, which seldom happens once it has filled.
const FEW = 256;

/**
 * The next token for `logits` [vocab] after the tokens `context`.
 * @param {Float32Array} logits
 * @param {number[]} context
 * @param {SamplingOptions} options
 * @param {() => number} [random]  uniform in [0, 1)
 * @returns {number}
 */
export function sample(logits, context, options, random = Math.random) {
  if (options.repetition_penalty !== 1 && context.length > 0) {
    logits = penalize(logits, context.slice(-PENALTY_WINDOW), options.repetition_penalty);
  }
  const best = argmax(logits);
  if (!Number.isFinite(logits[best])) {
    throw new Error("The model computes NaN or Inf: its file is damaged, or was exported from a broken checkpoint.");
  }
  if (options.temperature === 0) return best;
  const { tokens, weights } = candidates(logits, options);
  let rest = random() * weights.reduce((sum, weight) => sum + weight, 0);
  const chosen = weights.findIndex((weight) => (rest -= weight) < 0);
  return tokens[chosen < 0 ? tokens.length - 1 : chosen];
}

/**
 * A copy of `logits` where every token of `recent` is made less likely, each once.
 * @param {Float32Array} logits
 * @param {number[]} recent
 * @param {number} penalty
 */
export function penalize(logits, recent, penalty) {
  const penalized = logits.slice();
  penalty = Math.fround(penalty); // as NumPy computes
  for (const token of new Set(recent)) {
    penalized[token] = logits[token] > 0 ? logits[token] / penalty : logits[token] * penalty;
  }
  return penalized;
}

/**
 * Tokens left by top-k, top-p and min-p, most likely first, with probabilities relative to the first's. Where nothing is
 * cut off, in order of ids: sorting a large vocabulary takes as long as a step of a small model.
 * @param {Float32Array} logits
 * @param {SamplingOptions} options
 * @returns {{tokens: number[], weights: number[]}}
 */
export function candidates(logits, options) {
  const vocab = logits.length;
  const best = logits[argmax(logits)];
  const weigh = (/** @type {number} */ token) => Math.exp((logits[token] - best) / options.temperature);
  let tokens = options.top_k > 0 && options.top_k < vocab ? largest(logits, options.top_k) : [...logits.keys()];
  let weights = tokens.map(weigh);
  if (tokens.length === vocab && options.top_p === 1 && options.min_p === 0) return { tokens, weights };
  const reach = options.top_p * weights.reduce((sum, weight) => sum + weight, 0);
  // min-p and top-p both keep the head of one order, so what min-p cuts off needn't be sorted.
  tokens = tokens.filter((_, at) => weights[at] >= options.min_p);
  tokens.sort((a, b) => logits[b] - logits[a] || a - b);
  weights = tokens.map(weigh);
  if (options.top_p < 1) {
    let before = 0; // what the more likely tokens have together
    let kept = 0;
    while (kept < tokens.length && (kept === 0 || before < reach)) before += weights[kept++];
    tokens.length = weights.length = kept;
  }
  return { tokens, weights };
}

/**
 * The position of the largest value, the first among equals; NaN counts as largest.
 * @param {Float32Array} values
 */
function argmax(values) {
  let best = 0;
  for (let at = 0; at < values.length; at++) {
    if (!(values[at] <= values[best])) best = at;
    if (values[at] !== values[at]) return at;
  }
  return best;
}

/**
 * Positions of the `count` largest values, ascending; among equals the first.
 * @param {Float32Array} values
 * @param {number} count
 */
function largest(values, count) {
  if (count > FEW) {
    const order = [...values.keys()].sort((a, b) => values[b] - values[a] || a - b);
    return order.slice(0, count).sort((a, b) => a - b);
  }
  /** @type {number[]} */
  const found = []; // by falling value
  for (let at = 0; at < values.length; at++) {
    if (found.length === count && !(values[at] > values[found[count - 1]])) continue;
    let place = found.length;
    while (place > 0 && values[at] > values[found[place - 1]]) place--;
    found.splice(place, 0, at);
    if (found.length > count) found.pop();
  }
  return found.sort((a, b) => a - b);
}
