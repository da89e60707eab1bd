// Writes unixfs.json with ipfs-unixfs-importer, the reference for `ipfs add --cid-version=1 --raw-leaves`.
// Run in a directory where it is installed:
//   npm i ipfs-unixfs-importer@17 blockstore-core@7 && node unixfs_oracle.mjs OUT.json
// Content of every file, generated and never stored: byte i of chunk c (256 KiB each) is
// sha256(uint64_be(c))[i % 32]; see content() and its twin in tests/unit/primitives/test_unixfs.py.
import { createHash } from "node:crypto";
import { writeFileSync } from "node:fs";
import { importer } from "ipfs-unixfs-importer";
import { fixedSize } from "ipfs-unixfs-importer/chunker";
import { balanced } from "ipfs-unixfs-importer/layout";
import { BlackHoleBlockstore } from "blockstore-core/black-hole";

const CHUNK = 262144;
const SIZES = {
  "0 B": 0, "1 B": 1, "256 KiB": CHUNK, "256 KiB + 1": CHUNK + 1, "10 MB": 10_000_000,
  "174 chunks": 174 * CHUNK, "174 chunks + 1": 174 * CHUNK + 1, "45 MB": 45_700_000, "91 MB": 91_000_000,
  "348 chunks + 1": 348 * CHUNK + 1,
};

function* content(size) {
  for (let c = 0; c * CHUNK < size; c++) {
    const counter = Buffer.alloc(8);
    counter.writeBigUInt64BE(BigInt(c));
    yield Buffer.alloc(Math.min(CHUNK, size - c * CHUNK), createHash("sha256").update(counter).digest());
  }
}

async function cid(size) {
  const options = {
    cidVersion: 1, rawLeaves: true, reduceSingleLeafToSelf: true, wrapWithDirectory: false,
    chunker: fixedSize({ chunkSize: CHUNK }), layout: balanced({ maxChildrenPerNode: 174 }),
  };
  let last;
  for await (const entry of importer([{ path: "f", content: content(size) }], new BlackHoleBlockstore(), options)) last = entry;
  return last.cid.toString();
}

const files = [];
for (const [name, bytes] of Object.entries(SIZES)) files.push({ name, bytes, cid: await cid(bytes) });
writeFileSync(process.argv[2], JSON.stringify({ note: "made by unixfs_oracle.mjs", files }, null, 1) + "\n");
