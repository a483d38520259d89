// A model.onnx in onnxruntime-web's WebAssembly build: node logits.mjs MODEL ID,ID,… ID,… -> one line of JSON, the logits
// after each run of token ids. What is past goes back in as it came out.
import fs from 'node:fs';
import * as ort from 'onnxruntime-web';

const [model, ...runs] = process.argv.slice(2);
ort.env.wasm.numThreads = 1;
ort.env.logLevel = 'fatal';
const session = await ort.InferenceSession.create(fs.readFileSync(model), { executionProviders: ['wasm'] });

const feeds = {};
for (const { name, type, shape } of session.inputMetadata) {
  if (name.startsWith('past_key_values.')) {
    const dims = shape.map((dim, axis) => (typeof dim === 'number' ? dim : axis === 0 ? 1 : 0));
    feeds[name] = new ort.Tensor(type, type === 'int8' ? new Int8Array(0) : new Float32Array(0), dims);
  }
}

const answers = [];
let total = 0;
for (const run of runs) {
  const ids = run.split(',').map(BigInt);
  total += ids.length;
  feeds.input_ids = new ort.Tensor('int64', BigInt64Array.from(ids), [1, ids.length]);
  feeds.attention_mask = new ort.Tensor('int64', new BigInt64Array(total).fill(1n), [1, total]);
  const { logits, ...present } = await session.run(feeds);
  for (const [name, rows] of Object.entries(present)) feeds[name.replace('present.', 'past_key_values.')] = rows;
  answers.push(Array.from(logits.data.subarray(-logits.dims[2])));
}
console.log(JSON.stringify(answers));
process.exit(0); // its threads would keep node alive
