// Runs `castore ci restore`, `save` or `recover`; with `mode: both` restore now, and save after the job's last step.
//
// Only a JavaScript action is given the cache's address and token. This one hands them to castore alone: not to pip,
// not to later steps. Inputs reach castore as arguments, never through a shell.
import { spawn } from "node:child_process";
import { accessSync, appendFileSync, constants, statSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";

const OPTIONS = {
  restore: { flags: ["allow-fresh", "require-save"], values: ["resume"] },
  save: { flags: ["commit"], values: ["keep", "keep-optimizer", "max-size", "message"] },
  recover: { flags: ["commit"], values: ["message"], argument: "bundle" },
};
const CACHE = ["ACTIONS_RUNTIME_TOKEN", "ACTIONS_RESULTS_URL", "ACTIONS_CACHE_SERVICE_V2", "ACTIONS_CACHE_MODE"];
// what `castore ci` imports: all that castore needs but torch and safetensors
const PACKAGES = ["blake3", "msgpack", "msgspec", "numpy", "typer", "urllib3", "zstandard"];
const OWN = path.resolve(path.dirname(fileURLToPath(import.meta.url)), "..", "..");

class Failure extends Error {
  constructor(message, code) {
    super(message);
    this.code = code;
  }
}

function input(name) {
  return (process.env[`INPUT_${name.toUpperCase()}`] ?? "").trim();
}

const IS_POST = path.basename(process.argv[1] ?? "") === "post.mjs";

/** What to run now, restore or save; nothing after the job, unless the step asked for both. */
function currentMode() {
  const mode = input("mode");
  if (IS_POST) return mode === "both" ? "save" : "";
  return mode === "both" ? "restore" : mode;
}

const namesOf = ({ flags, values, argument }) => [...flags, ...values, ...(argument ? [argument] : [])];

/** The arguments of `castore`. A value is joined to its option, so that it can't be taken for another option. */
function command() {
  const mode = currentMode();
  if (!Object.hasOwn(OPTIONS, mode)) throw new Failure(`mode is restore, save, both or recover, not "${mode}"`, 2);
  const { flags, values, argument } = OPTIONS[mode];
  const allowed = input("mode") === "both" ? ["restore", "save"] : [mode];
  for (const name of Object.values(OPTIONS).flatMap(namesOf)) {
    const isUnset = !input(name) || input(name) === "false";
    const owners = Object.keys(OPTIONS).filter((owner) => namesOf(OPTIONS[owner]).includes(name));
    if (isUnset || owners.some((owner) => allowed.includes(owner))) continue;
    throw new Failure(`${name} belongs to mode ${owners.join(" or ")}, not to ${mode}`, 2);
  }
  const arguments_ = ["ci", mode];
  for (const name of flags) {
    if (!["", "true", "false"].includes(input(name))) {
      throw new Failure(`${name} is true or false, not "${input(name)}"`, 2);
    }
    if (input(name) === "true") arguments_.push(`--${name}`);
  }
  for (const name of values) if (input(name)) arguments_.push(`--${name}=${input(name)}`);
  if (argument && !input(argument)) throw new Failure(`mode ${mode} needs the input ${argument}`, 2);
  if (argument) arguments_.push("--", input(argument));
  return arguments_;
}

/** The environment without inputs and without any of the runner's own variables, ACTIONS_*. */
function plainEnvironment() {
  const inherited = Object.entries(process.env);
  return Object.fromEntries(inherited.filter(([name]) => !name.startsWith("ACTIONS_") && !name.startsWith("INPUT_")));
}

/** That, and the four variables of the cache; for what fetches or pushes, git's settings with the token too. */
function castoreEnvironment() {
  const environment = plainEnvironment();
  for (const name of CACHE) if (process.env[name] !== undefined) environment[name] = process.env[name];
  const token = input("token");
  if (token && (currentMode() === "restore" || input("commit") === "true")) {
    const encoded = Buffer.from(`x-access-token:${token}`).toString("base64");
    console.log(`::add-mask::${encoded}`);
    const key = `http.${process.env.GITHUB_SERVER_URL ?? "https://github.com"}/.extraheader`;
    // the empty value first takes away the header that actions/checkout may have left: two of them are refused
    for (const value of ["", `AUTHORIZATION: basic ${encoded}`]) {
      const at = Number(environment.GIT_CONFIG_COUNT ?? 0);
      environment[`GIT_CONFIG_KEY_${at}`] = key;
      environment[`GIT_CONFIG_VALUE_${at}`] = value;
      environment.GIT_CONFIG_COUNT = String(at + 1);
    }
  }
  return environment;
}

/** Runs a program to its end, passing signals on, and returns its exit code. */
function run(program, arguments_, options) {
  return new Promise((resolve, reject) => {
    const child = spawn(program, arguments_, { stdio: ["ignore", "inherit", "inherit"], ...options });
    const forward = (signal) => child.kill(signal);
    const signals = ["SIGINT", "SIGTERM", "SIGHUP"];
    for (const signal of signals) process.on(signal, forward);
    child.on("error", (error) => reject(new Failure(`${program} can't be run: ${error.message}`, 1)));
    child.on("close", (code, signal) => {
      for (const one of signals) process.off(one, forward);
      resolve(code ?? 128 + os.constants.signals[signal]);
    });
  });
}

/** The program's path, absolute unless it is looked up on PATH. */
async function program() {
  const given = input("castore");
  if (given) return given.includes("/") ? path.resolve(given) : given;
  return onPath("castore") ?? (await install());
}

function onPath(name) {
  const folders = (process.env.PATH ?? "").split(path.delimiter).filter(Boolean);
  return folders.map((folder) => path.resolve(folder, name)).find((file) => {
    try {
      accessSync(file, constants.X_OK);
      return statSync(file).isFile();
    } catch {
      return false;
    }
  });
}

/** Installs castore from this action's own checkout, once a job, with the versions it was tested with. */
async function install() {
  const home = path.join(process.env.RUNNER_TEMP ?? os.tmpdir(), "castore-action");
  const python = path.join(home, "bin", "python");
  const installed = path.join(home, "bin", "castore");
  const check = async (name, arguments_) => {
    const code = await run(name, arguments_, { env: plainEnvironment() });
    if (code) throw new Failure(`castore could not be installed: ${path.basename(name)} ended with ${code}`, code);
  };
  const pip = [python, ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]];
  try {
    accessSync(installed, constants.X_OK); // by an earlier step: castore itself comes last, so the rest is there
  } catch {
    await check("python3", ["-c", "import sys; sys.exit(sys.version_info < (3, 11) and 'castore needs Python 3.11')"]);
    await check("python3", ["-m", "venv", home]);
    await check(pip[0], [...pip[1], "--constraint", path.join(OWN, "constraints.txt"), ...PACKAGES]);
    await check(pip[0], [...pip[1], "--no-deps", OWN]);
  }
  return installed;
}

/** Runs the command and returns the exit code. */
async function main() {
  try {
    const arguments_ = command();
    const cwd = path.resolve(input("working-directory"));
    const code = await run(await program(), arguments_, { cwd, env: castoreEnvironment() });
    if (code) console.log(`::error title=castore::castore ${arguments_.slice(0, 2).join(" ")}: exit code ${code}`);
    return code;
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    const message = error.message.replace(/[%\r\n]/g, encodeURIComponent); // as the runner's commands want it
    console.log(`::error title=castore::${message}`);
    return error.code;
  }
}

if (!IS_POST || currentMode()) {
  process.exitCode = 1; // if it throws
  const code = await main();
  if (process.env.GITHUB_OUTPUT) appendFileSync(process.env.GITHUB_OUTPUT, `exit-code=${code}\n`);
  process.exitCode = code;
}
