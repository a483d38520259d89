// The page's end of worker.js: a model that loads, answers and stops.

/** @typedef {import("./worker.js").Reply} Reply */
/** @typedef {import("./worker.js").Request} Request */

/** Something that the model's side said went wrong. */
export class EngineError extends Error {
  /**
   * @param {string} message
   * @param {boolean} contextFull
   */
  constructor(message, contextFull) {
    super(message);
    this.contextFull = contextFull;
  }
}

const PATIENCE = 10_000; // milliseconds for a step of a large model; no chat template takes so long that is meant well

/** A model in a worker. One thing at a time: load, then ask. */
export class Engine {
  constructor() {
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    this.deadline = undefined; // runs from a stop to its answer
    this.#start();
  }

  #start() {
    this.worker = new Worker("/worker.js", { type: "module" });
  }

  /**
   * Load the model; again, after an error or with another engine, in a new worker.
   * @param {import("./worker.js").EngineChoice} engine
   * @param {number} threads  0: as many as are useful
   * @param {(reply: Reply) => void} onProgress
   * @returns {Promise<import("./worker.js").Ready>}
   */
  load(engine, threads, onProgress) {
    this.worker?.terminate();
    this.#noDeadline(); // of a stop that this worker has been spared
    this.#start();
    return /** @type {any} */ (this.#converse({ type: "load", engine, threads }, "ready", onProgress));
  }

  /**
   * The answer to `text`, event by event.
   * @param {string} text
   * @param {import("./generate.js").GenerationOptions} options
   * @param {(reply: Reply) => void} onEvent
   * @returns {Promise<import("./generate.js").GenerationStats>}
   */
  ask(text, options, onEvent) {
    return /** @type {any} */ (this.#converse({ type: "ask", text, options }, "stats", onEvent));
  }

  /** End the answer after the step that is being computed; should it never end, end the worker. */
  stop() {
    this.#post({ type: "stop" });
    this.deadline ||= setTimeout(() => {
      this.worker?.terminate();
      this.worker = undefined;
      this.giveUp?.(new EngineError("The model did not stop.", false));
    }, PATIENCE);
  }

  /**
   * Forget the conversation.
   * @param {string} system  the next one's system prompt; empty for none
   */
  reset(system) {
    this.#post({ type: "reset", system });
  }

  /** Take the last turn back. */
  undo() {
    this.#post({ type: "undo" });
  }

  /** @param {Request} request */
  #post(request) {
    this.worker?.postMessage(request);
  }

  /**
   * Send a request and hand on its replies up to the last.
   * @param {Request} request
   * @param {string} last
   * @param {(reply: Reply) => void} onReply
   */
  #converse(request, last, onReply) {
    const worker = /** @type {Worker} */ (this.worker);
    const done = new Promise((resolve, reject) => {
      this.giveUp = reject;
      worker.onmessage = ({ data }) => {
        const reply = /** @type {Reply} */ (data);
        if (reply.type === "error") reject(new EngineError(reply.message, reply.contextFull));
        else if (reply.type === last) resolve(reply);
        else onReply(reply);
      };
      worker.onerror = (event) => reject(new EngineError(event.message || "The page's worker can't start.", false));
      worker.onmessageerror = () => reject(new EngineError("The page's worker sent what can't be read.", false));
      this.#post(request);
    });
    return done.finally(() => this.#noDeadline());
  }

  #noDeadline() {
    clearTimeout(this.deadline);
    this.deadline = undefined;
  }
}
