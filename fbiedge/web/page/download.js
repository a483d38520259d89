// A model's files into memory, with progress.

/**
 * @typedef {object} RemoteFile
 * @property {string} url
 * @property {string} name
 * @property {number} bytes
 */

/**
 * @param {RemoteFile[]} files
 * @param {(done: number, total: number) => void} progress  bytes of all files
 * @returns {Promise<{name: string, data: Uint8Array}[]>}
 */
export async function download(files, progress) {
  const total = files.reduce((sum, file) => sum + file.bytes, 0);
  let before = 0;
  const found = [];
  for (const file of files) {
    const data = await downloadOne(file, (done) => progress(before + done, total));
    found.push({ name: file.name, data });
    before += file.bytes;
  }
  return found;
}

/**
 * Straight into an array of the known size: a large model is in memory once.
 * @param {RemoteFile} file
 * @param {(done: number) => void} progress
 */
async function downloadOne(file, progress) {
  const response = await fetch(file.url);
  if (!response.ok || !response.body) throw new Error(`${file.name} can't be loaded: ${response.status}`);
  const changed = () => new Error(`${file.name} has changed since fbiedge started. Start it again.`);
  const data = new Uint8Array(file.bytes);
  const reader = response.body.getReader();
  let at = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    if (at + value.length > file.bytes) throw changed();
    data.set(value, at);
    progress((at += value.length));
  }
  if (at !== file.bytes) throw changed();
  return data;
}
