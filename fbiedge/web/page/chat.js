// A conversation with a model, as fbiedge/chat.py: the whole conversation is the prompt of every answer, and the ids that
// the model generated stand where its answers were, because its words tokenized again may split differently; so all but
// the newest turn is still in the cache. A conversation that leaves too little room for an answer loses its oldest turns,
// so many at a time that the next turns need no more shifts: what stays must be run again.

import { generate } from "./generate.js";

/**
 * @typedef {import("./template.js").Message} Message
 * @typedef {import("./template.js").ChatTemplate} ChatTemplate
 *
 * @typedef {object} Turn
 * @property {string} question
 * @property {string} answer
 * @property {number[] | null} ids  null where they are not exactly the ids of `answer`
 *
 * @typedef {object} Talk  what the next prompt is made of; never changed, only replaced
 * @property {Turn[]} turns
 * @property {number[]} plainIds  without a template: the ids of all the text so far
 */

/** The question alone is longer than the model's context. */
export class ContextFull extends Error {}

/** Turns with one model. Without a chat template every turn's text is added to one text, which the model continues. */
export class Chat {
  /**
   * @param {import("./session.js").Session} session
   * @param {import("./tokenizer.js").Tokenizer} tokenizer
   * @param {ChatTemplate | null} template
   * @param {Set<number>} ends
   */
  constructor(session, tokenizer, template, ends) {
    this.session = session;
    this.tokenizer = tokenizer;
    this.template = template;
    this.ends = ends;
    /** @type {Message[]} */
    this.system = [];
    /** @type {Talk} */
    this.talk = { turns: [], plainIds: [] };
    this.before = this.talk; // the last turn
  }

  /**
   * Forget the conversation.
   * @param {string} system  the next one's system prompt; empty for none, as for a template that takes none
   */
  reset(system) {
    this.system = system && this.template?.takesSystem ? [{ role: "system", content: system }] : [];
    this.talk = this.before = { turns: [], plainIds: [] };
  }

  /** Take the last turn back. */
  undo() {
    this.talk = this.before;
  }

  /**
   * The answer to `text`, which joins the conversation with it, also when cancelled halfway. Throws ContextFull; the turn
   * then leaves no trace.
   * @param {string} text
   * @param {import("./generate.js").GenerationOptions} options
   * @param {() => boolean} cancelled
   * @returns {AsyncGenerator<import("./generate.js").Event>}
   */
  async *ask(text, options, cancelled) {
    const { capacity } = this.session;
    const before = this.talk;
    let { turns } = before;
    let ids;
    let keep = 1; // a shift leaves the first token, on which models lean
    if (this.template === null) {
      ids = this.#plainPrompt(text);
    } else {
      ({ turns, ids } = this.#fitting(this.template, text, options.maxTokens));
      keep = this.#fixedStart(this.template, ids);
    }
    if (ids.length > capacity) {
      throw new ContextFull(`A text of ${ids.length} tokens is longer than the model's context of ${capacity}.`);
    }
    const forgottenTurns = before.turns.length - turns.length;
    let answer = "";
    for await (const event of generate(this.session, this.tokenizer, ids, options, this.ends, keep, cancelled)) {
      if (event.type === "piece") {
        answer += event.text;
      } else if (event.type === "stats") {
        const { generatedIds } = event;
        if (generatedIds.length > 0 || event.finishReason !== "cancelled") {
          const same = this.tokenizer.decode(generatedIds) === answer;
          this.before = before;
          this.talk = {
            turns: [...turns, { question: text, answer, ids: same ? generatedIds : null }],
            plainIds: [...ids, ...generatedIds],
          };
        }
        event.forgottenTurns = forgottenTurns;
      }
      yield event;
    }
  }

  /**
   * The turns that stay, and the prompt made of them and the question `text`.
   * @param {ChatTemplate} template
   * @param {string} text
   * @param {number} maxTokens
   */
  #fitting(template, text, maxTokens) {
    const { capacity } = this.session;
    let { turns } = this.talk;
    let ids = this.#prompt(template, turns, text);
    const room = Math.min(maxTokens || capacity, Math.floor(capacity / 4));
    if (ids.length + room > capacity) {
      while (turns.length > 0 && ids.length > Math.floor(capacity / 2)) {
        turns = turns.slice(1);
        ids = this.#prompt(template, turns, text);
      }
    }
    return { turns, ids };
  }

  /**
   * How many tokens of the prompt `ids` come before the first turn's text; a shift in an answer leaves them.
   * @param {ChatTemplate} template
   * @param {number[]} ids
   */
  #fixedStart(template, ids) {
    const other = this.#prompt(template, [], "\ue000");
    return Math.max(0, ids.findIndex((id, at) => id !== other[at]));
  }

  /** @param {string} text */
  #plainPrompt(text) {
    const { capacity } = this.session;
    const { plainIds } = this.talk;
    if (plainIds.length === 0) return this.tokenizer.encode(text);
    const added = this.tokenizer.encodeRendered("\n" + text, true);
    const ids = [...plainIds, ...added];
    if (ids.length <= capacity - Math.floor(capacity / 4)) return ids;
    return [ids[0], ...ids.slice(-Math.max(added.length, Math.floor(capacity / 2)))];
  }

  /**
   * Ids of the conversation by the template, with the generated ids of earlier answers in their places.
   * @param {ChatTemplate} template
   * @param {Turn[]} turns
   * @param {string} text
   */
  #prompt(template, turns, text) {
    const render = (/** @type {(turn: Turn, index: number) => string} */ answerOf) =>
      template.render([
        ...this.system,
        ...turns.flatMap((turn, index) => /** @type {Message[]} */ ([
          { role: "user", content: turn.question },
          { role: "assistant", content: answerOf(turn, index) },
        ])),
        { role: "user", content: text },
      ]);
    const mark = (/** @type {number} */ index) => `\ue000${index}\ue001`;
    const rendered = render((turn) => turn.answer);
    const whole = () => this.tokenizer.encodeRendered(rendered);
    if (turns.every((turn) => turn.ids === null)) return whole();
    // Where the template changes an answer (trims it, drops the thinking), the ids would say something else.
    let frame = render((turn, index) => (turn.ids === null ? turn.answer : mark(index)));
    /** @type {number[]} */
    const ids = [];
    let joined = "";
    for (const [index, turn] of turns.entries()) {
      if (turn.ids === null) continue;
      const at = frame.indexOf(mark(index));
      if (at < 0) return whole();
      const between = frame.slice(0, at);
      frame = frame.slice(at + mark(index).length);
      joined += between + turn.answer;
      ids.push(...this.tokenizer.encodeRendered(between, ids.length > 0), ...turn.ids);
    }
    if (joined + frame !== rendered) return whole();
    return [...ids, ...this.tokenizer.encodeRendered(frame, true)];
  }
}
