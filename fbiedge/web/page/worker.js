// The model's side of the page, in a thread of its own so that the page stays quick: loads the model, keeps the
// conversation and generates. engine.js is the other end; both speak the messages below.

import { Chat, ContextFull } from "./chat.js";
import { download } from "./download.js";
import { Session } from "./session.js";
import { ChatTemplate } from "./template.js";
import { Tokenizer } from "./tokenizer.js";

/**
 * @typedef {"auto" | "webgpu" | "wasm"} EngineChoice
 *
 * @typedef {{type: "load", engine: EngineChoice, threads: number}
 *   | {type: "ask", text: string, options: import("./generate.js").GenerationOptions}
 *   | {type: "stop"}
 *   | {type: "reset", system: string}
 *   | {type: "undo"}} Request
 *
 * @typedef {object} Ready
 * @property {"ready"} type
 * @property {string} engine  what computes, in a few words
 * @property {string} note  why it isn't WebGPU, where that is worth knowing
 * @property {boolean} takesSystem
 *
 * @typedef {{type: "download", done: number, total: number}
 *   | {type: "prepare"}
 *   | Ready
 *   | import("./generate.js").Event
 *   | {type: "error", message: string, contextFull: boolean}} Reply
 */

const LARGEST_FILES = 2 ** 32; // bytes that WebAssembly can address
const MOST_THREADS = 8;
const scope = /** @type {DedicatedWorkerGlobalScope} */ (/** @type {unknown} */ (self));

/** @type {Chat | null} */
let chat = null;
let stopped = false;

/** @param {Reply} reply */
function post(reply) {
  scope.postMessage(reply);
}

/**
 * @param {EngineChoice} choice
 * @param {number} threads
 */
async function load(choice, threads) {
  const description = await (await fetch("/model.json")).json();
  const tokenizer = new Tokenizer(description);
  const { template: found } = description;
  const template = found && new ChatTemplate(found.source, found.specialTokens);
  if (description.files.some((/** @type {any} */ file) => file.bytes >= LARGEST_FILES)) {
    throw new Error("This model is larger than the 4 GB that a page can use.");
  }
  const files = await download(description.files, (done, total) => post({ type: "download", done, total }));
  post({ type: "prepare" });
  const { session, engine, note } = await openSession(files, description, choice, threads);
  chat = new Chat(session, tokenizer, template, new Set(description.ends));
  post({ type: "ready", engine, note, takesSystem: template !== null && template.takesSystem });
}

/**
 * On the GPU where there is one that can take the model, else on the CPU.
 * @param {{name: string, data: Uint8Array}[]} files
 * @param {any} description
 * @param {EngineChoice} choice
 * @param {number} threads  0: as many as are useful
 */
async function openSession(files, description, choice, threads) {
  let note = "";
  if (choice !== "wasm") {
    note = await reasonAgainstGpu(description, choice === "webgpu");
    if (!note) {
      try {
        const ort = await import("/lib/ort.webgpu.min.mjs");
        const session = await Session.open(ort, files, "webgpu", description.capacity);
        await session.forward([description.bos ?? 0]); // what a GPU can't compute shows in the first run
        await session.reuse([]);
        return { session, engine: "WebGPU", note: "" };
      } catch (error) {
        note = `WebGPU failed: ${error instanceof Error ? error.message : error}`;
      }
    }
  }
  const ort = await import("/lib/ort.wasm.min.mjs");
  // Only a page that is isolated from others may share memory between threads. Half of what a browser counts as
  // processors are often second halves of cores, which make nothing quicker; and the page needs some of one too.
  const useful = Math.min(MOST_THREADS, Math.ceil((navigator.hardwareConcurrency || 1) / 2));
  const used = scope.crossOriginIsolated ? Math.min(threads || useful, MOST_THREADS) : 1;
  ort.env.wasm.numThreads = used;
  const session = await Session.open(ort, files, "wasm", description.capacity);
  return { session, engine: `WebAssembly, ${used} thread${used > 1 ? "s" : ""}`, note };
}

/**
 * @param {any} description
 * @param {boolean} anyGpu  also one that is a program, which is right and slow
 */
async function reasonAgainstGpu(description, anyGpu) {
  const gpu = /** @type {any} */ (navigator).gpu;
  if (!scope.isSecureContext) return "over plain HTTP, browsers give other devices neither GPU nor threads";
  if (!gpu) return "this browser has no WebGPU";
  const adapter = await gpu.requestAdapter();
  if (!adapter || (adapter.info?.isFallbackAdapter && !anyGpu)) return "there is no GPU";
  if (description.kvCache === "int8") return "GPUs can't hold an 8-bit KV cache: export with --ops stock for WebGPU";
  if (description.needsF16 && !adapter.features.has("shader-f16")) return "this GPU has no 16-bit floats";
  return "";
}

/**
 * @param {string} text
 * @param {import("./generate.js").GenerationOptions} options
 */
async function ask(text, options) {
  if (chat === null) return;
  stopped = false;
  for await (const event of chat.ask(text, options, () => stopped)) {
    post(event);
    await breath();
  }
}

// A message to oneself comes after those that have arrived meanwhile, such as a stop; a timer would wait 4 ms.
const { port1, port2 } = new MessageChannel();

function breath() {
  return new Promise((resolve) => {
    port1.onmessage = resolve;
    port2.postMessage(null);
  });
}

scope.onmessage = async ({ data }) => {
  const request = /** @type {Request} */ (data);
  try {
    if (request.type === "load") await load(request.engine, request.threads);
    else if (request.type === "ask") await ask(request.text, request.options);
    else if (request.type === "stop") stopped = true;
    else if (request.type === "reset") chat?.reset(request.system);
    else if (request.type === "undo") chat?.undo();
  } catch (error) {
    const message = error instanceof Error ? error.message : String(error);
    post({ type: "error", message, contextFull: error instanceof ContextFull });
  }
};
