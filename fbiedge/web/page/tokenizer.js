// Text to ids and back, as fbiedge/tokenizer.py does it: the same library's tokenizers, and the same way of turning ids
// into text while they are being generated, where one character may take several tokens.

import { ByteLevelPreTokenizer, Tokenizer as LibraryTokenizer } from "/lib/tokenizers.js";

// JavaScript's \s knows U+FEFF and not U+0085; the library in Rust has it the other way round.
const WORDS = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;
const BYTE_TOKEN = /^<0x[0-9A-Fa-f]{2}>$/;

/**
 * What /model.json says about the tokenizer.
 * @typedef {object} TokenizerDescription
 * @property {any} tokenizer  tokenizer.json
 * @property {number | null} bos
 * @property {boolean} addBos
 */

/** The tokenizer that travels in a model. Special tokens in text count as such; decoding leaves them out. */
export class Tokenizer {
  /** @param {TokenizerDescription} description */
  constructor({ tokenizer, bos, addBos }) {
    this.library = new LibraryTokenizer(tokenizer, { clean_up_tokenization_spaces: false });
    const first = /** @type {any} */ (this.library.pre_tokenizer);
    for (const step of [first, ...(first?.tokenizers ?? [])]) {
      if (step instanceof ByteLevelPreTokenizer) step.pattern = WORDS;
    }
    this.bos = bos;
    this.addBos = addBos;
    const decoder = tokenizer.decoder ?? {};
    /** @type {Set<string>} */
    this.decoders = new Set((decoder.decoders ?? [decoder]).map((/** @type {any} */ step) => step.type).filter(Boolean));
    this.special = new Set(
      [...this.library.get_added_tokens_decoder().values()].filter((token) => token.special).map((token) => token.id),
    );
  }

  /**
   * Ids of a whole prompt, with the beginning-of-text token where the model was trained with one.
   * @param {string} text
   * @returns {number[]}
   */
  encode(text) {
    const ids = this.library.encode(wellFormed(text)).ids;
    return this.bos !== null && (this.addBos || ids.length === 0) && ids[0] !== this.bos ? [this.bos, ...ids] : ids;
  }

  /**
   * Ids of text that spells out its own special tokens, as chat templates do; `continues`: other ids go before.
   * @param {string} text
   * @param {boolean} [continues]
   * @returns {number[]}
   */
  encodeRendered(text, continues = false) {
    if (text === "") return [];
    const ids = this.library.encode(wellFormed(text), { add_special_tokens: false }).ids;
    // Llama's tokenizer puts a space before every text; in the middle of one it doesn't belong.
    const spaced = continues && ids.length > 0 && this.token(ids[0]) === "▁" && !text.startsWith(" ");
    return spaced ? ids.slice(1) : ids;
  }

  /**
   * The text of `ids`.
   * @param {number[]} ids
   */
  decode(ids) {
    const stream = new DetokenizeStream(this);
    return ids.map((id) => stream.push(id)).join("") + stream.flush();
  }

  /**
   * The token of an id, undefined where there is none: an embedding may be padded to more rows than there are tokens.
   * @param {number} id
   * @returns {string | undefined}
   */
  token(id) {
    return this.library.id_to_token(id);
  }
}

/**
 * Turns ids into text one at a time: the pieces joined are the text of all ids, each character in one piece. `context`
 * are the ids before the first: where Llama's decoder drops the space that starts a text, it must know that the text
 * doesn't start here.
 */
export class DetokenizeStream {
  /**
   * @param {Tokenizer} tokenizer
   * @param {number[]} [context]
   */
  constructor(tokenizer, context = []) {
    this.tokenizer = tokenizer;
    const steps = tokenizer.decoders;
    this.byteLevel = steps.size > 0 && [...steps].every((step) => step === "ByteLevel" || step === "Fuse");
    this.byteFallback = steps.has("ByteFallback");
    this.utf8 = new TextDecoder("utf-8", { ignoreBOM: true });
    // The last ids whose text is out, as context for the next, and those whose text is held back.
    this.before = context.slice(-8).filter((id) => !this.isByte(id)).slice(-1);
    /** @type {number[]} */
    this.held = [];
  }

  /**
   * The text that `id` completes, often that of this token, empty in the middle of a character.
   * @param {number} id
   * @returns {string}
   */
  push(id) {
    const token = this.tokenizer.token(id);
    if (token === undefined || this.tokenizer.special.has(id)) return "";
    if (this.byteLevel) return this.utf8.decode(byteLevelBytes(token), { stream: true });
    if (this.isByte(id)) {
      return this.heldText() + this.utf8.decode(Uint8Array.of(parseInt(token.slice(3, 5), 16)), { stream: true });
    }
    const text = this.utf8.decode();
    this.held.push(id);
    const fresh = this.newText();
    if (fresh.endsWith("\ufffd") && !this.byteFallback) return text; // in the middle of a character spelled otherwise
    return text + this.heldText(fresh);
  }

  /** What is still held back at the end: an unfinished character becomes U+FFFD. */
  flush() {
    return this.heldText() + this.utf8.decode();
  }

  /** @param {number} id */
  isByte(id) {
    return this.byteFallback && BYTE_TOKEN.test(this.tokenizer.token(id) ?? "");
  }

  newText() {
    const textOf = (/** @type {number[]} */ ids) => {
      const shown = ids.filter((id) => !this.tokenizer.special.has(id));
      return shown.length > 0 ? this.tokenizer.library.decode(shown) : "";
    };
    return textOf([...this.before, ...this.held]).slice(textOf(this.before).length);
  }

  heldText(text = this.held.length > 0 ? this.newText() : "") {
    if (this.held.length === 0) return "";
    this.before = this.held.slice(-1);
    this.held = [];
    return text;
  }
}

/**
 * Without lone surrogates, which UTF-8 has no form for.
 * @param {string} text
 */
function wellFormed(text) {
  return text.replace(/\p{Surrogate}/gu, "?");
}

// GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes in order for the characters from 256 on.
const BYTE_OF = (() => {
  /** @type {Map<string, number>} */
  const table = new Map();
  let others = 256;
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte >= 0x21 && byte < 0x7f) || (byte >= 0xa1 && byte < 0xad) || byte >= 0xae;
    table.set(String.fromCharCode(printable ? byte : others++), byte);
  }
  return table;
})();

/**
 * The bytes that a byte-level token stands for; an added token, which may hold anything, stands for itself.
 * @param {string} token
 */
function byteLevelBytes(token) {
  const bytes = Array.from(token, (character) => BYTE_OF.get(character));
  return bytes.includes(undefined) ? new TextEncoder().encode(token) : Uint8Array.from(/** @type {number[]} */ (bytes));
}
