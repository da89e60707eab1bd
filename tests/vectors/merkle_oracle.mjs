// Writes merkle.json with @openzeppelin/merkle-tree, the library whose proofs MerkleProof.sol checks.
// Run in a directory where it is installed: npm i @openzeppelin/merkle-tree@1.0.8 && node merkle_oracle.mjs OUT.json
// Leaves: task = sha256("merkle task"), account i = sha256("account i")[:20], amounts from 0 to 2^256 - 1.
import { createHash } from "node:crypto";
import { writeFileSync } from "node:fs";
import { StandardMerkleTree } from "@openzeppelin/merkle-tree";

const sha = (text) => createHash("sha256").update(text).digest("hex");
const task = "0x" + sha("merkle task");
const hex = (n) => { const d = n.toString(16); return "0x" + (d.length % 2 ? "0" + d : d); };

const trees = [1, 2, 3, 4, 5, 7, 8, 33].map((count) => {
  const rows = Array.from({ length: count }, (_, i) => [
    task,
    "0x" + sha(`account ${i}`).slice(0, 40),
    i === 0 ? 0n : i === 1 ? 2n ** 256n - 1n : BigInt(i) * 10n ** 18n + BigInt(i),
  ]);
  const tree = StandardMerkleTree.of(rows, ["bytes32", "address", "uint256"]);
  return {
    root: tree.root,
    leaves: rows.map((row) => ({
      task: row[0], account: row[1], cumulative: hex(row[2]), leaf: tree.leafHash(row), proof: tree.getProof(row),
    })),
  };
});
writeFileSync(process.argv[2], JSON.stringify({ note: "made by merkle_oracle.mjs", trees }, null, 1) + "\n");
