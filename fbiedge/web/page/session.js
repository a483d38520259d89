// A model in onnxruntime-web that knows which tokens its KV cache holds (as fbiedge/session.py).
//
// ONNX Runtime for browsers can't bind one buffer as past and present, so the cache is what the last run gave: keys and
// values of exactly `position` rows, which the next run takes and lengthens. On a GPU they stay there.

/** @typedef {typeof import("onnxruntime-web")} Ort */
/** @typedef {import("onnxruntime-web").Tensor} Tensor */

const PAST = "past_key_values.";
const PRESENT = "present.";

/** One model with one KV cache, for one conversation at a time. */
export class Session {
  /**
   * Use `Session.open`.
   * @param {Ort} ort
   * @param {import("onnxruntime-web").InferenceSession} onnx
   * @param {number} capacity
   */
  constructor(ort, onnx, capacity) {
    this.ort = ort;
    this.onnx = onnx;
    this.capacity = capacity; // tokens
    /** @type {number[]} */
    this.tokens = [];
    /** @type {Record<string, Tensor>} */
    this.cache = {};
    this.#clear();
  }

  /**
   * @param {Ort} ort
   * @param {{name: string, data: Uint8Array}[]} files  the graph, then its external data
   * @param {"webgpu" | "wasm"} provider
   * @param {number} capacity
   */
  static async open(ort, files, provider, capacity) {
    const [graph, ...external] = files;
    const onnx = await ort.InferenceSession.create(graph.data, {
      executionProviders: [provider],
      externalData: external.map(({ name, data }) => ({ path: name, data })),
      logSeverityLevel: 3, // errors; the warnings are about this graph being as it is
      ...(provider === "webgpu" ? { preferredOutputLocation: "gpu-buffer" } : {}),
    });
    return new Session(ort, onnx, capacity);
  }

  /** Tokens in the cache, which is the position of the next. */
  get position() {
    return this.tokens.length;
  }

  /**
   * Append `ids` to the cache -> logits [vocab] for the token after the last.
   * @param {number[]} ids
   * @returns {Promise<Float32Array>}
   */
  async forward(ids) {
    const { Tensor } = this.ort;
    const total = this.position + ids.length;
    const outputs = await this.onnx.run({
      ...this.cache,
      input_ids: new Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]),
      attention_mask: new Tensor("int64", new BigInt64Array(total).fill(1n), [1, total]),
    });
    const past = this.cache;
    this.cache = Object.fromEntries(Object.keys(past).map((name) => [name, outputs[name.replace(PAST, PRESENT)]]));
    for (const tensor of Object.values(past)) tensor.dispose();
    this.tokens.push(...ids);
    const { logits } = outputs; // a row for each of `ids`
    const rows = /** @type {Float32Array} */ (await logits.getData());
    logits.dispose();
    return rows.slice(-logits.dims[2]);
  }

  /**
   * Keep of the cache what `ids` begin with, but never all of `ids` -> tokens of `ids` that need no forward(). At least
   * one is left to forward, because its logits are not kept.
   * @param {number[]} ids
   */
  async reuse(ids) {
    let common = 0;
    while (common < ids.length - 1 && common < this.position && ids[common] === this.tokens[common]) common++;
    if (common === 0) {
      this.#clear();
    } else if (common < this.position) {
      const kept = Object.entries(this.cache).map(async ([name, tensor]) => [name, await this.#firstRows(tensor, common)]);
      this.cache = Object.fromEntries(await Promise.all(kept));
      this.tokens.length = common;
    }
    return common;
  }

  #clear() {
    for (const tensor of Object.values(this.cache)) tensor.dispose();
    this.tokens = [];
    for (const input of this.onnx.inputMetadata) {
      if (!input.isTensor || !input.name.startsWith(PAST)) continue;
      const [, heads, , size] = /** @type {number[]} */ (input.shape);
      const dims = size === undefined ? [1, heads, 0] : [1, heads, 0, size];
      const data = input.type === "int8" ? new Int8Array() : new Float32Array();
      this.cache[input.name] = new this.ort.Tensor(/** @type {any} */ (input.type), data, dims);
    }
  }

  /**
   * The first `rows` rows of each head of a tensor [1, heads, rows, ...].
   * @param {Tensor} tensor
   * @param {number} rows
   */
  async #firstRows(tensor, rows) {
    const [, heads, held, ...rest] = tensor.dims;
    const width = rest[0] ?? 1;
    const data = /** @type {Float32Array | Int8Array} */ (await tensor.getData());
    const kept = data instanceof Int8Array ? new Int8Array(heads * rows * width) : new Float32Array(heads * rows * width);
    for (let head = 0; head < heads; head++) {
      const start = head * held * width;
      kept.set(data.subarray(start, start + rows * width), head * rows * width);
    }
    tensor.dispose();
    return new this.ort.Tensor(/** @type {any} */ (tensor.type), kept, [1, heads, rows, ...rest]);
  }
}
