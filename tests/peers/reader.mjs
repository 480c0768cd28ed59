// A reader of castore's format in another language, made from FORMAT.md alone: objects (sections 3 to 5) and parts (6).
//
//   node reader.mjs MODULES ROOT       prints every part of every manifest as JSON, in the notation of expected.json,
//                                      but of a float its bits alone
//   node reader.mjs MODULES ROOT ID    prints the hash of an object that it has read and verified
//
// MODULES is the folder of npm packages that have BLAKE3 and Zstandard.

import { readFileSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { createRequire } from "node:module";

const [modules, root, wanted] = process.argv.slice(2);
const require = createRequire(join(modules, "x.js"));
const { blake3 } = require("@noble/hashes/blake3");
const { decompress } = require("fzstd");

const hex = (bytes) => Buffer.from(bytes).toString("hex");

function need(condition, what) {
  if (!condition) throw new Error(`damaged: ${what}`);
}

// -- objects --------------------------------------------------------------------------------------------------------

function readObject(id, length) {
  const data = readFileSync(join(root, "objects", id.slice(0, 2), id));
  need(data.length >= 16 && data.length <= 67112960, "size");
  need(data.toString("latin1", 0, 4) === "CSTO" && data.readUInt16LE(6) === 0, "header");
  const [version, codec, n] = [data[4], data[5], Number(data.readBigUInt64LE(8))];
  need(n <= 67108864 && (length === undefined || n === length), "length");
  need(codec <= 3 && version === (codec === 3 ? 2 : 1), "codec");
  const plain = decode(codec, data.subarray(16), n);
  need(hex(blake3(plain)) === id, "hash");
  return plain;
}

function decode(codec, payload, n) {
  return [raw, zstd, planes, sparse][codec](payload, n);
}

function raw(payload, n) {
  need(payload.length === n, "raw length");
  return payload;
}

function zstd(payload, n) {
  need(payload.readUInt32LE(0) === 0xfd2fb528, "zstd magic");
  const descriptor = payload[4];
  const single = (descriptor >> 5) & 1;
  const dictionary = descriptor & 3;
  const size = descriptor >> 6;
  need(dictionary === 0 && (single || size), "zstd header");
  const at = single ? 5 : 6;
  const content = [payload[at], payload.readUInt16LE(at) + 256, payload.readUInt32LE(at)][size]
    ?? Number(payload.readBigUInt64LE(at));
  const window = single ? content : (2 ** (10 + (payload[5] >> 3)) / 8) * (8 + (payload[5] & 7));
  need(content === n && window <= 8388608, "zstd size");
  const plain = Buffer.from(decompress(payload, new Uint8Array(n)));
  need(plain.length === n, "zstd content");
  return plain;
}

function planes(payload, n) {
  const s = payload[0];
  need(s >= 2 && s <= 8 && n % s === 0, "element width");
  const headers = [];
  let at = 1;
  for (let sum = 0; sum < s; at += 6) {
    headers.push([payload[at], payload[at + 1], payload.readUInt32LE(at + 2)]);
    sum += payload[at];
  }
  const plain = Buffer.alloc(n);
  let offset = 0;
  for (const [width, kind, stored] of headers) {
    need([1, 2, 4, 8].includes(width) && s % width === 0 && offset % width === 0, "plane header");
    need(kind <= 1 && offset + width <= s, "plane header");
    const plane = decode(kind, payload.subarray(at, at + stored), (n / s) * width);
    for (let i = 0; i < n / s; i++) plane.copy(plain, i * s + offset, i * width, (i + 1) * width);
    at += stored;
    offset += width;
  }
  need(at === payload.length, "rest");
  return plain;
}

function sparse(payload, n) {
  const [s, codec, kind, after, b] = [payload[0], payload[1], payload[2], payload[3], payload.readUInt32LE(4)];
  need([2, 4, 8].includes(s) && n % s === 0 && codec <= 2 && kind <= 1 && 8 + b <= payload.length, "sparse header");
  const count = n / s;
  const bytes = Math.ceil(count / 8);
  need(after === bytes * 8 - count, "bits after the last");
  const bitmap = decode(kind, payload.subarray(8, 8 + b), bytes);
  const isSet = (i) => (bitmap[i >> 3] >> (i & 7)) & 1;
  for (let i = count; i < bytes * 8; i++) need(!isSet(i), "bits past the end");
  let present = 0;
  for (let i = 0; i < count; i++) present += isSet(i);
  const elements = decode(codec, payload.subarray(8 + b), present * s);
  const plain = Buffer.alloc(n);
  for (let i = 0, taken = 0; i < count; i++) {
    if (isSet(i)) elements.copy(plain, i * s, taken * s, ++taken * s);
  }
  return plain;
}

// -- MessagePack, as far as an index uses it ------------------------------------------------------------------------

class Items {
  constructor(data) {
    this.data = data;
    this.at = 0;
  }

  bytes(count) {
    need(this.at + count <= this.data.length, "end");
    this.at += count;
    return this.data.subarray(this.at - count, this.at);
  }

  unsigned(size) {
    return size === 8 ? this.bytes(8).readBigUInt64BE() : BigInt(this.bytes(size).readUIntBE(0, size));
  }

  signed(size) {
    return size === 8 ? this.bytes(8).readBigInt64BE() : BigInt(this.bytes(size).readIntBE(0, size));
  }

  length(size) {
    return Number(this.unsigned(size));
  }

  next() {
    const type = this.bytes(1)[0];
    if (type < 0x80) return BigInt(type);
    if (type >= 0xe0) return BigInt(type - 256);
    if (type >= 0xa0 && type < 0xc0) return this.bytes(type - 0xa0).toString("utf8");
    if (type >= 0xd4 && type <= 0xd8) return this.extension(2 ** (type - 0xd4));
    switch (type) {
      case 0xc0: return null;
      case 0xc2: return false;
      case 0xc3: return true;
      case 0xc4: case 0xc5: case 0xc6: return this.bytes(this.length(2 ** (type - 0xc4)));
      case 0xc7: case 0xc8: case 0xc9: return this.extension(this.length(2 ** (type - 0xc7)));
      case 0xca: throw new Error("float32 is not read here");
      case 0xcb: return { float: Buffer.from(this.bytes(8)) };
      case 0xcc: case 0xcd: case 0xce: case 0xcf: return this.unsigned(2 ** (type - 0xcc));
      case 0xd0: case 0xd1: case 0xd2: case 0xd3: return this.signed(2 ** (type - 0xd0));
      case 0xd9: case 0xda: case 0xdb: return this.bytes(this.length(2 ** (type - 0xd9))).toString("utf8");
      default: throw new Error(`damaged: type ${type}`);
    }
  }

  extension(length) {
    const code = this.bytes(1).readInt8();
    return { code, payload: this.bytes(length) };
  }
}

// -- parts ----------------------------------------------------------------------------------------------------------

const SIZES = {
  uint16: 2, int16: 2, float16: 2, bfloat16: 2, bits16: 2, complex32: 4, uint32: 4, int32: 4, float32: 4,
  uint64: 8, int64: 8, float64: 8, complex64: 8, complex128: 16,
};

function readPart(indexId) {
  const data = Buffer.from(readObject(indexId));
  const items = new Items(data);
  need(items.next() === 1n, "version");
  const [digests, packed] = [items.next(), items.next()];
  need(digests.length * 4 === packed.length * 32, "chunks");
  const chunks = [];
  for (let i = 0; i < packed.length / 4; i++) {
    chunks.push(readObject(hex(digests.subarray(32 * i, 32 * i + 32)), packed.readUInt32LE(4 * i)));
  }
  const stream = Buffer.concat(chunks);
  const tensors = [];
  for (let left = items.next(); left > 0n; left--) {
    const dtype = items.next();
    const shape = [];
    for (let extents = items.next(); extents > 0n; extents--) shape.push(Number(items.next()));
    const [offset, size] = [Number(items.next()), (SIZES[dtype] ?? 1) * shape.reduce((a, b) => a * b, 1)];
    const bytes = stream.subarray(offset, offset + size);
    need(bytes.length === size, "beyond the stream");
    tensors.push({ dtype, shape, ...(size <= 64 ? { bytes: hex(bytes) } : { blake3: hex(blake3(bytes)) }) });
  }
  const value = readValue(items, 0);
  need(items.at === data.length, "rest");
  return { value, tensors };
}

function readValue(items, depth) {
  need(depth <= 100, "depth");
  const item = items.next();
  if (item === null || typeof item !== "object" || Buffer.isBuffer(item) || !("code" in item)) return scalar(item);
  const { code, payload } = item;
  if (code === 6) return { int: signedOf(payload).toString() };
  if (code === 7) {
    return { complex: [0, 8].map((at) => hex(Buffer.from(payload.subarray(at, at + 8)).reverse())) };
  }
  const number = payload.readUInt32LE();
  const many = () => Array.from({ length: number }, () => readValue(items, depth + 1));
  const pairs = () => Array.from({ length: number }, () => [readValue(items, depth + 1), readValue(items, depth + 1)]);
  switch (code) {
    case 1: return { list: many() };
    case 2: return { tuple: many() };
    case 3: return { dict: pairs() };
    case 4: return { OrderedDict: pairs() };
    case 5: return { tensor: number };
    case 8: return { object: [items.next(), ...many()] };
    default: throw new Error(`damaged: extension ${code}`);
  }
}

function signedOf(payload) {
  const big = BigInt(`0x${hex(Buffer.from(payload).reverse())}`);
  return payload[payload.length - 1] & 0x80 ? big - (1n << BigInt(8 * payload.length)) : big;
}

function scalar(value) {
  if (typeof value === "bigint") return { int: value.toString() };
  if (Buffer.isBuffer(value)) return { bytes: hex(value) };
  if (value !== null && typeof value === "object") return { bits: hex(value.float) };
  return value;
}

// -- everything -----------------------------------------------------------------------------------------------------

function readManifests() {
  const found = {};
  const folders = readdirSync(join(root, "manifests"), { withFileTypes: true }).filter((item) => item.isDirectory());
  for (const { name: run } of folders) {
    for (const name of readdirSync(join(root, "manifests", run)).filter((file) => file.endsWith(".json"))) {
      const data = readFileSync(join(root, "manifests", run, name));
      const manifest = JSON.parse(data.toString("utf8"));
      const id = hex(blake3(data));
      need(name === `${String(manifest.step).padStart(9, "0")}-${id.slice(0, 12)}.json`, "name");
      found[id] = {};
      for (const [part, { index }] of Object.entries(manifest.parts)) found[id][part] = readPart(index);
    }
  }
  return found;
}

process.stdout.write(JSON.stringify(wanted ? hex(blake3(readObject(wanted))) : readManifests()));
