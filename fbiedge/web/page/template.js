// A conversation as the text that the model was trained on, by the Jinja template that travels in the model.

import { Template } from "/lib/jinja.js";

/** @typedef {{role: "system" | "user" | "assistant", content: string}} Message */

/** A compiled chat template. */
export class ChatTemplate {
  /**
   * @param {string} source
   * @param {Record<string, string>} specialTokens  bos_token, eos_token and so on by name
   */
  constructor(source, specialTokens) {
    this.template = new Template(source);
    this.specialTokens = specialTokens;
  }

  /**
   * The text of `messages`, ending where the model's answer begins.
   * @param {Message[]} messages
   * @returns {string}
   */
  render(messages) {
    const variables = { tools: null, documents: null, ...this.specialTokens };
    try {
      return this.template.render({ ...variables, messages, add_generation_prompt: true });
    } catch (error) {
      throw new Error(`The model's chat template failed: ${error instanceof Error ? error.message : error}`);
    }
  }

  /** Whether conversations may begin with a system prompt: templates refuse what their model doesn't know. */
  get takesSystem() {
    const word = "\ue000system\ue001";
    try {
      return this.render([{ role: "system", content: word }, { role: "user", content: "?" }]).includes(word);
    } catch {
      return false;
    }
  }
}
