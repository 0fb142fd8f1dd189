// @ts-check
/** PNG without a canvas: some browsers add noise to what is read from one, and a mask must arrive as it was painted. */

/**
 * One channel as a PNG of 8-bit grey.
 * @param {Uint8Array} data @param {number} width @param {number} height @returns {Promise<Blob>}
 */
export async function encodeGrey(data, width, height) {
  const rows = new Uint8Array((width + 1) * height); // every row begins with its filter, none
  for (let y = 0; y < height; y++) rows.set(data.subarray(y * width, (y + 1) * width), y * (width + 1) + 1);
  const packed = new Blob([rows]).stream().pipeThrough(new CompressionStream("deflate"));
  const header = new DataView(new ArrayBuffer(13));
  header.setUint32(0, width);
  header.setUint32(4, height);
  header.setUint8(8, 8);
  const parts = [
    new Uint8Array([137, 80, 78, 71, 13, 10, 26, 10]),
    chunk("IHDR", new Uint8Array(header.buffer)),
    chunk("IDAT", new Uint8Array(await new Response(packed).arrayBuffer())),
    chunk("IEND", new Uint8Array(0)),
  ];
  return new Blob(parts, { type: "image/png" });
}

/** @param {string} name @param {Uint8Array} body */
function chunk(name, body) {
  const bytes = new Uint8Array(12 + body.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, body.length);
  for (let i = 0; i < 4; i++) bytes[4 + i] = name.charCodeAt(i);
  bytes.set(body, 8);
  view.setUint32(8 + body.length, crc32(bytes.subarray(4, 8 + body.length)));
  return bytes;
}

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

/** @param {Uint8Array} bytes */
function crc32(bytes) {
  let value = 0xffffffff;
  for (const byte of bytes) value = CRC[(value ^ byte) & 255] ^ (value >>> 8);
  return (value ^ 0xffffffff) >>> 0;
}

const MARK = "dreammix";

/**
 * Whether a file seems to carry a request: the name under which it is kept stands in it, in one or two bytes a letter.
 * @param {Blob} file
 */
export async function carriesRequest(file) {
  const text = new TextDecoder("latin1").decode(await file.arrayBuffer());
  return text.includes(MARK) || text.includes([...MARK].join("\0"));
}
