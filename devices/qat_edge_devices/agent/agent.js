// Run one artifact in onnxruntime-web, in a worker of agent.html: the browser's equal of the Python agent.
//
// The page's address names a request and a folder for results, as the arguments of the Python agent do; agent/agent.py
// describes both. Two things differ. Files are read from and written to the server of this page. And the outputs of `trace` are
// one .npy file per output, in a folder per sequence, because JavaScript has no writer of .npz files.

const FORMAT = 2; // of request and result
const EXIT_REJECTED = 65;
const CHUNK_TOKENS = 256; // tokens whose logits are in memory at once
const CACHE = "past_key_values.", NEW_CACHE = "present."; // of the KV cache among inputs and outputs
const DECODER_INPUTS = ["input_ids", "attention_mask", "position_ids"];
const OUT_OF_MEMORY = /memory|bad_alloc|allocation|SafeInt/i; // SafeInt: a tensor has more bytes than 32 bits can count
const LIBRARIES = { onnx: "ort.wasm.min.mjs", "onnx-webgpu": "ort.webgpu.min.mjs" };
const ROOT = new URL("../", import.meta.url); // the work folder

class RequestRejected extends Error {}

// A decoder in onnxruntime-web, with the KV cache of one sequence. The cache stays in the runtime's tensors from call to call.
class Decoder {
  constructor(ort, session, config) {
    Object.assign(this, { ort, session, headSize: config.model?.decoder?.head_size });
    const lengths = [config.model?.context_length, config.search?.max_length].filter((length) => length != null);
    this.contextLength = lengths.length ? Math.min(...lengths) : null;
    this.inputs = new Map(session.inputMetadata.map((input) => [input.name, input]));
    this.cacheInputs = [...this.inputs.values()].filter((input) => input.name.startsWith(CACHE));
    this.outputs = session.outputNames.filter((name) => !name.startsWith(NEW_CACHE));

    const unknown = [...this.inputs.keys()].filter((name) => !DECODER_INPUTS.includes(name) && !name.startsWith(CACHE));
    if (unknown.length || !this.outputs.includes("logits")) {
      throw new RequestRejected(`model.onnx is not a decoder with a KV cache (unknown inputs: ${unknown}).`);
    }
  }

  reset() {
    this.position = 0;
    this.cache = Object.fromEntries(this.cacheInputs.map((input) => [input.name, this.emptyCache(input)]));
  }

  // A cache tensor of no tokens, (1, heads, 0, head size).
  emptyCache({ name, type, shape }) {
    const heads = shape[1], size = typeof shape[3] === "number" ? shape[3] : this.headSize;
    if (type !== "float32" || typeof heads !== "number" || typeof size !== "number") {
      throw new RequestRejected(`${name} of model.onnx is ${type} (${shape}), and not a float32 cache whose size is known.`);
    }
    return new this.ort.Tensor(type, new Float32Array(0), [1, heads, 0, size]);
  }

  feed(ids) {
    const total = this.position + ids.length;
    const values = {
      input_ids: BigInt64Array.from(ids, BigInt),
      attention_mask: new BigInt64Array(total).fill(1n),
      position_ids: BigInt64Array.from(ids, (_, index) => BigInt(this.position + index)),
    };
    const known = Object.entries(values).filter(([name]) => this.inputs.has(name));
    return Object.fromEntries(known.map(([name, data]) => [name, new this.ort.Tensor("int64", data, [1, data.length])]));
  }

  // Run the graph on `ids`; return its outputs by name, the logits as (1, rows, vocabulary).
  async forward(ids) {
    const found = await this.session.run({ ...this.feed(ids), ...this.cache });
    for (const name in this.cache) {
      this.cache[name].dispose();
      this.cache[name] = found[name.replace(CACHE, NEW_CACHE)];
    }
    this.position += ids.length;
    postMessage("step");
    return found;
  }

  // Return the token that follows `ids`.
  async next(ids) {
    const { dims, data } = (await this.forward(ids)).logits;
    const row = data.subarray(data.length - dims[2]);
    let best = 0;
    for (let token = 1; token < row.length; token++) if (row[token] > row[best]) best = token;
    return best;
  }

  start(prompt) {
    this.reset();
    return this.next(prompt);
  }

  // Yield all outputs except the cache, chunk by chunk: many tokens at once, from `decodeFrom` on one at a time.
  async *read(ids, decodeFrom) {
    this.reset();
    const end = Math.min(decodeFrom ?? ids.length, ids.length);
    for (let begin = 0; begin < ids.length;) {
      const count = begin < end ? Math.min(CHUNK_TOKENS, end - begin) : 1;
      const found = await this.forward(ids.slice(begin, begin + count));
      if (found.logits.dims[1] !== count) {
        throw new RequestRejected("model.onnx gives the last token's logits only, so sequences cannot be scored.");
      }
      yield Object.fromEntries(this.outputs.map((name) => [name, found[name]]));
      begin += count;
    }
  }
}

async function score(decoder, request, out) {
  let written = 0, rowBytes = 0, done = 0;
  for (const ids of request.sequences) {
    requireLength(decoder, ids.length, `sequence ${done}`);
    // The size of a row is known after the first sequence.
    if (done && written + rowBytes * ids.length > request.max_bytes) break;
    const name = `${out}/logits-${number(done)}.npy`;
    for await (const { logits } of decoder.read(ids, request.decode_from)) {
      if (decoder.position <= logits.dims[1]) await append(name, npyHeader(ids.length, logits.dims[2]));
      await append(name, logits.data);
      rowBytes = logits.dims[2] * 4;
    }
    written += rowBytes * ids.length;
    await progress(++done, request.sequences.length);
  }
  return { scored: done };
}

async function trace(decoder, request, out) {
  for (const [index, ids] of request.sequences.entries()) {
    requireLength(decoder, ids.length, `sequence ${index}`);
    for await (const chunk of decoder.read(ids, request.decode_from)) {
      for (const [position, { dims, data }] of Object.values(chunk).entries()) {
        const name = `${out}/outputs-${number(index)}/arr_${position}.npy`;
        if (decoder.position <= dims[1]) await append(name, npyHeader(ids.length, dims[2]));
        await append(name, Float32Array.from(data));
      }
    }
    await progress(index + 1, request.sequences.length);
  }
  return { outputs: decoder.outputs };
}

async function generate(decoder, request) {
  const completions = [], endIds = new Set(request.eos_ids);
  for (const [index, prompt] of request.prompts.entries()) {
    requireLength(decoder, prompt.length + 1, `prompt ${index} and a first token`, 2);
    const longest = request.max_new_tokens, limit = Math.min(longest, (decoder.contextLength ?? Infinity) - prompt.length);

    const began = performance.now();
    let token = await decoder.start(prompt);
    const ttft_ms = performance.now() - began;

    const ids = [];
    while (!endIds.has(token)) {
      ids.push(token);
      if (ids.length === limit) break;
      token = await decoder.next([token]);
    }
    // The end token itself is not part of the answer.
    const stopped = endIds.has(token) ? "eos" : limit === longest ? "length" : "context";
    completions.push({ ids, stopped, ttft_ms });
    await progress(index + 1, request.prompts.length);
  }
  return { completions };
}

async function speed(decoder, { prefill, decode, repeats }) {
  requireLength(decoder, prefill + decode + 1, "the prompt and the decode steps");
  const prompt = Array.from({ length: prefill }, (_, index) => 1 + index % 7); // a dense model takes equally long for any ids
  const result = { prefill_tokens_per_s: [], decode_tokens_per_s: [], step_ms: [], ttft_ms: [] };
  let before, wallBegan;
  for (let round = 0; round <= repeats; round++) {
    // Round 0 is the warm-up: CPU time and the state of the machine are taken after it.
    if (round === 1) {
      before = await machine();
      wallBegan = performance.now();
    }
    const times = [performance.now()];
    let token = await decoder.start(prompt);
    times.push(performance.now());
    for (let step = 0; step < decode; step++) {
      token = await decoder.next([token]);
      times.push(performance.now());
    }

    if (round > 0) {
      const firstMs = times[1] - times[0];
      result.ttft_ms.push(firstMs);
      result.prefill_tokens_per_s.push(prefill * 1e3 / firstMs);
      result.decode_tokens_per_s.push(decode * 1e3 / (times.at(-1) - times[1]));
      result.step_ms.push(...times.slice(2).map((time, step) => time - times[step + 1]));
    }
    await progress(round + 1, 1 + repeats);
  }
  const wallS = (performance.now() - wallBegan) / 1e3, after = await machine();
  return { ...result, cores_busy: (after.cpu_s - before.cpu_s) / wallS, before: before.state, after: after.state };
}

const TASKS = { score, trace, generate, speed };

async function run(request, out) {
  const ort = await import(`./${LIBRARIES[request.backend]}`);
  const isWebGpu = request.backend === "onnx-webgpu";
  if (isWebGpu && !await navigator.gpu?.requestAdapter()) {
    throw new RequestRejected("this browser has no WebGPU adapter: give it a GPU, or measure WebAssembly with --device browser.");
  }
  const threads = Math.min(request.threads, navigator.hardwareConcurrency);
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";

  // The runtime compiles its WebAssembly with the first session: here with one of no bytes, which is refused.
  await ort.InferenceSession.create(new Uint8Array(0)).catch(() => {});
  const baseline = await machine("?forget_peak");

  const began = performance.now();
  const decoder = await load(ort, request, isWebGpu);
  const load_ms = performance.now() - began;

  const result = await TASKS[request.task](decoder, request, out);

  const memory = await machine();
  const stats = {
    runtime: isWebGpu ? "onnxruntime-web (WebGPU)" : "onnxruntime-web",
    runtime_version: ort.env.versions.web,
    threads,
    pool_threads: threads,
    context_length: decoder.contextLength,
    load_ms,
    baseline_rss_bytes: baseline.resident_bytes,
    peak_rss_bytes: memory.peak_bytes,
    peak_includes_import: !baseline.peak_forgotten,
  };
  await append(`${out}/result.json`, JSON.stringify({ format: FORMAT, load: stats, ...result }));
}

async function load(ort, request, isWebGpu) {
  const folder = new URL(`${request.artifact}/`, ROOT);
  const config = await fetch(new URL("genai_config.json", folder)).then((found) => found.ok ? found.json() : {});
  const externalData = request.external_data.map((path) => ({ path, data: new URL(path, folder).href }));
  const options = { executionProviders: [isWebGpu ? "webgpu" : "wasm"], externalData, logSeverityLevel: 3 };
  let session;
  try {
    session = await ort.InferenceSession.create(new URL("model.onnx", folder).href, options);
  } catch (error) {
    throw describe(error, "model.onnx cannot be loaded");
  }
  return new Decoder(ort, session, config);
}

// Return an error of the runtime as one that has the reason in one line.
function describe(error, what) {
  if (error instanceof RequestRejected) return error;
  const reason = String(error?.message ?? error).replace(/\s+/g, " ");
  if (!OUT_OF_MEMORY.test(reason)) return what === undefined ? error : new RequestRejected(`${what}: ${reason}`);
  return new RequestRejected(`the page ran out of memory (${reason}). WebAssembly has 4 GB for weights and KV cache at most.`);
}

// Refuse empty input, and input longer than the cache.
function requireLength(decoder, tokens, what, least = 1) {
  if (tokens < least) throw new RequestRejected(`${what}: no token ids were given, so there is nothing to predict from.`);
  if (decoder.contextLength !== null && tokens > decoder.contextLength) {
    throw new RequestRejected(
      `${what} takes ${tokens} tokens and the artifact's context holds ${decoder.contextLength}: request fewer, or export with ` +
      "a longer context.",
    );
  }
}

// The header of a .npy file of float32 (rows, columns), padded as the format requires.
function npyHeader(rows, columns) {
  const header = `{'descr': '<f4', 'fortran_order': False, 'shape': (${rows}, ${columns}), }`;
  const length = Math.ceil((10 + header.length + 1) / 64) * 64 - 10;
  const prefix = [0x93, ...new TextEncoder().encode("NUMPY"), 1, 0, length & 255, length >> 8];
  return new Uint8Array([...prefix, ...new TextEncoder().encode(header.padEnd(length - 1) + "\n")]);
}

const number = (index) => String(index).padStart(5, "0");
const progress = (done, total) => post("_line", `progress ${done} ${total}`);
const machine = (query = "") => fetch(new URL(`_machine${query}`, ROOT)).then((found) => found.json());
const append = (name, body) => post(`_append/${name}`, body);

async function post(name, body) {
  const response = await fetch(new URL(name, ROOT), { method: "POST", body });
  if (!response.ok) throw new Error(`${name}: ${response.status} ${await response.text()}`);
}

async function main() {
  const given = new URLSearchParams(location.search);
  const request = await fetch(new URL(given.get("request"), ROOT)).then((found) => found.json());
  await run(request, given.get("results"));
}

main().then(
  () => postMessage({ code: 0, message: "" }),
  (error) => {
    const found = describe(error);
    const isRejected = found instanceof RequestRejected;
    postMessage({ code: isRejected ? EXIT_REJECTED : 1, message: isRejected ? found.message : found.stack ?? String(found) });
  },
);
