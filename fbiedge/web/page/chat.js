// A conversation with a model, as fbiedge/chat.py: the whole conversation is the prompt of every answer, and the ids that
// the model generated stand where its answers were, because its words tokenized again may split differently; so all but
// the newest turn is still in the cache.

import { generate } from "./generate.js";

/**
 * @typedef {import("./template.js").Message} Message
 * @typedef {object} Answer
 * @property {string} text
 * @property {number[] | null} ids  null where they are not exactly the ids of `text`
 */

/** The conversation no longer fits the model's context. */
export class ContextFull extends Error {}

/** Turns with one model. Without a chat template every turn's text is added to one text, which the model continues. */
export class Chat {
  /**
   * @param {import("./session.js").Session} session
   * @param {import("./tokenizer.js").Tokenizer} tokenizer
   * @param {import("./template.js").ChatTemplate | null} template
   * @param {Set<number>} ends
   */
  constructor(session, tokenizer, template, ends) {
    this.session = session;
    this.tokenizer = tokenizer;
    this.template = template;
    this.ends = ends;
    this.reset("");
  }

  /**
   * Forget the conversation.
   * @param {string} system  the next one's system prompt; empty for none
   */
  reset(system) {
    /** @type {Message[]} */
    this.messages = system ? [{ role: "system", content: system }] : [];
    /** @type {Answer[]} */
    this.answers = [];
    /** @type {number[][]} */
    this.plainIds = []; // without a template: the ids of all the text after each turn
  }

  /** Take the last turn back. */
  undo() {
    this.messages.splice(-2);
    this.answers.pop();
    this.plainIds.pop();
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
    /** @type {Message[]} */
    const messages = [...this.messages, { role: "user", content: text }];
    const ids = this.template === null ? this.#plainPrompt(text) : this.#prompt(this.template, messages);
    if (ids.length > this.session.capacity) {
      throw new ContextFull(
        `The conversation of ${ids.length} tokens no longer fits the model's context of ${this.session.capacity}.`,
      );
    }
    let answer = "";
    for await (const event of generate(this.session, this.tokenizer, ids, options, this.ends, cancelled)) {
      if (event.type === "piece") {
        answer += event.text;
      } else if (event.type === "stats" && (event.generatedIds.length > 0 || event.finishReason !== "cancelled")) {
        const same = this.tokenizer.decode(event.generatedIds) === answer;
        this.answers.push({ text: answer, ids: same ? event.generatedIds : null });
        this.messages = [...messages, { role: "assistant", content: answer }];
        this.plainIds.push([...ids, ...event.generatedIds]);
      }
      yield event;
    }
  }

  /** @param {string} text */
  #plainPrompt(text) {
    const before = this.plainIds.at(-1);
    if (!before) return this.tokenizer.encode(text);
    return [...before, ...this.tokenizer.encodeRendered("\n" + text, true)];
  }

  /**
   * Ids of `messages` by the template, with the generated ids of earlier answers in their places.
   * @param {import("./template.js").ChatTemplate} template
   * @param {Message[]} messages
   */
  #prompt(template, messages) {
    const rendered = template.render(messages);
    const whole = () => this.tokenizer.encodeRendered(rendered);
    const mark = (/** @type {number} */ index) => `\ue000${index}\ue001`;
    let answered = 0;
    const marked = messages.map((message) => {
      if (message.role !== "assistant") return message;
      const index = answered++;
      return this.answers[index].ids === null ? message : { ...message, content: mark(index) };
    });
    // Where the template changes an answer (trims it, drops the thinking), the ids would say something else.
    let frame = template.render(marked);
    /** @type {number[]} */
    const ids = [];
    let joined = "";
    for (const [index, answer] of this.answers.entries()) {
      if (answer.ids === null) continue;
      const at = frame.indexOf(mark(index));
      if (at < 0) return whole();
      const before = frame.slice(0, at);
      frame = frame.slice(at + mark(index).length);
      joined += before + answer.text;
      ids.push(...this.tokenizer.encodeRendered(before, ids.length > 0), ...answer.ids);
    }
    if (ids.length === 0 || joined + frame !== rendered) return whole();
    return [...ids, ...this.tokenizer.encodeRendered(frame, true)];
  }
}
