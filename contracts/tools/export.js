// Copies { abi, bytecode } of every contract of src/ from forge's output to the Python package. With --check it
// only compares, and fails when a committed artifact is stale, missing or superfluous.
'use strict';

const fs = require('fs');
const path = require('path');

const project = path.join(__dirname, '..');
const target = path.join(project, '..', 'p2pflock', 'chain', 'artifacts');
const isCheck = process.argv.includes('--check');

const names = fs
  .readdirSync(path.join(project, 'src'))
  .filter((file) => file.endsWith('.sol'))
  .map((file) => file.slice(0, -'.sol'.length));

const wanted = new Map();
for (const name of names) {
  const built = JSON.parse(fs.readFileSync(path.join(project, 'out', `${name}.sol`, `${name}.json`), 'utf8'));
  if (built.bytecode.object === '0x') continue; // abstract
  const abi = built.abi;
  wanted.set(`${name}.json`, JSON.stringify({ abi, bytecode: built.bytecode.object }, null, 1) + '\n');
}

fs.mkdirSync(target, { recursive: true });
const stale = [];
for (const [file, text] of wanted) {
  const place = path.join(target, file);
  if (fs.existsSync(place) && fs.readFileSync(place, 'utf8') === text) continue;
  if (isCheck) stale.push(file);
  else fs.writeFileSync(place, text);
}
for (const file of fs.readdirSync(target).filter((file) => file.endsWith('.json'))) {
  if (wanted.has(file)) continue;
  if (isCheck) stale.push(file);
  else fs.unlinkSync(path.join(target, file));
}
if (stale.length) {
  process.stderr.write(`artifacts differ from a fresh build: ${stale.join(', ')}; run contracts/tools/build.sh\n`);
  process.exit(1);
}
