// The page: fits the model's side (engine.js), the conversation (view.js) and the settings together.

import { Engine, EngineError } from "./engine.js";
import { SettingsView } from "./settings.js";
import { ConversationView } from "./view.js";

/** @typedef {"loading" | "failed" | "ready" | "answering"} State */

const CHAT_IDEAS = ["Tell me a story about a dog.", "What do you like to do for fun?", "Do you have any pets?"];
const SHOWN_FROM = 4; // tokens; a speed of fewer jumps about
const TEXT_IDEAS = ["Once upon a time", "One day, a little fox", "In the middle of the night"];

const $ = (/** @type {string} */ id) => /** @type {HTMLElement} */ (document.getElementById(id));
const mayHover = matchMedia("(hover: hover)"); // no phone, where a focus would bring up a keyboard
const input = /** @type {HTMLTextAreaElement} */ ($("input"));
const send = /** @type {HTMLButtonElement} */ ($("send"));
const stop = /** @type {HTMLButtonElement} */ ($("stop"));
const newChat = /** @type {HTMLButtonElement} */ ($("new-chat"));
const progress = /** @type {HTMLProgressElement} */ ($("progress"));

const engine = new Engine();
const conversation = new ConversationView($("messages"), $("scroll"), $("to-end"));
const settings = new SettingsView(/** @type {HTMLDialogElement} */ ($("settings")), (name) => {
  if (name === "engine" || name === "threads") load();
  if (name === "system" && state === "ready" && conversation.list.childElementCount === 0) startChat();
});

/** @type {State} */
let state = "loading";
/** @type {any} */
let model = null; // what /model.json says

/** @param {State} next */
function enter(next) {
  state = next;
  const answering = next === "answering";
  stop.hidden = !answering;
  send.hidden = answering;
  newChat.disabled = next !== "ready";
  updateSend();
}

function updateSend() {
  send.disabled = state !== "ready" || input.value.trim() === "";
}

/** What had the focus may just have gone, and with it the place of who uses the keyboard. */
function takeFocus() {
  const lost = document.activeElement === document.body || document.activeElement?.closest("[hidden], #new-chat");
  if (mayHover.matches && lost) input.focus({ preventScroll: true });
}

/** @param {string} text */
function say(text) {
  $("status").textContent = text;
}

/**
 * @param {string} text
 * @param {string} label
 * @param {() => void} act
 */
function notify(text, label, act) {
  $("notice-text").textContent = text;
  $("notice-action").textContent = label;
  $("notice-action").onclick = act;
  $("notice").hidden = false;
}

async function load() {
  if (state === "answering") engine.stop();
  enter("loading");
  $("notice").hidden = true;
  $("loading").hidden = false;
  $("ideas").hidden = true;
  $("welcome").hidden = false;
  conversation.clear();
  progress.removeAttribute("value");
  $("progress-text").textContent = "";
  $("welcome-title").textContent = "Loading the model";
  $("engine").textContent = "Loading";
  try {
    const response = await fetch("/model.json");
    if (!response.ok) throw new Error(`the server answers ${response.status}`);
    model = await response.json();
    $("model-name").textContent = document.title = model.name;
    settings.setRecommended(model.sampling);
    const ready = await engine.load(settings.values.engine, settings.values.threads, showProgress);
    settings.setTakesSystem(ready.takesSystem);
    $("engine").textContent = ready.engine;
    $("engine").title = ready.note;
    $("engine-hint").textContent = ready.note || "a change loads the model again";
    startChat();
  } catch (error) {
    fail(error instanceof EngineError ? error.message : `fbiedge can't be reached: ${messageOf(error)}`);
  }
}

/** @param {string} reason */
function fail(reason) {
  enter("failed");
  $("loading").hidden = true;
  $("welcome-title").textContent = "The model isn't loaded";
  $("engine").textContent = "Not loaded";
  notify(reason, "Try again", load);
}

/** @param {import("./engine.js").Reply} reply */
function showProgress(reply) {
  if (reply.type === "download") {
    progress.max = reply.total;
    progress.value = reply.done;
    $("progress-text").textContent = `${megabytes(reply.done)} of ${megabytes(reply.total)} MB`;
  } else if (reply.type === "prepare") {
    progress.removeAttribute("value");
    $("progress-text").textContent = "Preparing";
  }
}

/** Begin a conversation with an empty page. */
function startChat() {
  engine.reset(settings.values.system);
  conversation.clear();
  $("notice").hidden = true;
  $("loading").hidden = true;
  $("welcome").hidden = false;
  $("welcome-title").textContent = model.template ? "What shall we talk about?" : "How does the text begin?";
  const ideas = model.template ? CHAT_IDEAS : TEXT_IDEAS;
  $("ideas").replaceChildren(
    ...ideas.map((idea) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = idea;
      button.addEventListener("click", () => answer(idea));
      item.append(button);
      return item;
    }),
  );
  $("ideas").hidden = false;
  enter("ready");
  takeFocus();
}

/** @param {string} text */
async function answer(text) {
  if (state !== "ready") return;
  enter("answering");
  $("welcome").hidden = true;
  $("notice").hidden = true;
  dropActions();
  takeFocus();
  const question = conversation.addUser(text);
  const view = conversation.addAnswer();
  say("The model is writing");
  const { sampling, maxTokens } = settings.values;
  let first = 0; // when the first token came
  let tokens = 0;
  try {
    const stats = await engine.ask(text, { sampling, maxTokens }, (event) => {
      if (event.type === "prompt" && event.done < event.total) {
        view.about([`Reading ${event.done} of ${event.total} tokens`]);
      } else if (event.type === "piece") {
        view.append(event.text);
        first ||= performance.now();
        tokens += 1;
        if (tokens > SHOWN_FROM) view.about([`${rate(tokens - 1, (performance.now() - first) / 1000)} tok/s`]);
      }
    });
    if (!view.element.isConnected) return; // the model is being loaded again
    const nothing = stats.generatedIds.length === 0 && stats.finishReason === "cancelled";
    if (nothing) takeBack(question, view, text);
    else finish(view, text, stats);
  } catch (error) {
    if (!view.element.isConnected) return;
    takeBack(question, view, text);
    const full = error instanceof EngineError && error.contextFull;
    if (full) notify(error.message, "New chat", startChat);
    else notify(`The answer broke off: ${messageOf(error)}`, "Load again", load);
  }
  view.finish();
  enter(engine.worker ? "ready" : "failed");
  takeFocus();
}

/**
 * @param {import("./view.js").AnswerView} view
 * @param {string} question
 * @param {import("./generate.js").GenerationStats} stats
 */
function finish(view, question, stats) {
  const count = stats.generatedIds.length;
  const facts = [`${rate(stats.decodeSteps, stats.decodeSeconds)} tok/s`, `${count} token${count === 1 ? "" : "s"}`];
  if (stats.finishReason === "cancelled") facts.push("stopped");
  if (stats.finishReason === "length") facts.push("cut at the longest answer");
  if (stats.finishReason === "context") facts.push("cut: the text would not end");
  if (stats.forgottenTurns) facts.push(`the model has forgotten ${stats.forgottenTurns} earlier turn${stats.forgottenTurns > 1 ? "s" : ""}`);
  if (view.text === "") view.append("(no text)");
  const actions = [
    { label: "Copy", act: () => copy(view.text) },
    { label: "Regenerate", act: () => again(view, question) },
  ];
  const cached = stats.cachedTokens ? `, ${stats.cachedTokens} of them still in the cache` : "";
  view.about(facts, actions, `prompt of ${stats.promptTokens} tokens${cached}, read in ${stats.prefillSeconds.toFixed(2)} s`);
  say(`Answer: ${view.text}`);
}

/**
 * As if it had not been asked.
 * @param {HTMLElement} question
 * @param {import("./view.js").AnswerView} view
 * @param {string} text
 */
function takeBack(question, view, text) {
  question.remove();
  view.element.remove();
  if (input.value === "") input.value = text;
  if (conversation.list.childElementCount === 0) $("welcome").hidden = false;
  say("");
}

/**
 * Another answer to the last question.
 * @param {import("./view.js").AnswerView} view
 * @param {string} question
 */
function again(view, question) {
  if (state !== "ready") return;
  engine.undo();
  view.element.previousElementSibling?.remove();
  view.element.remove();
  answer(question);
}

/** Only the last answer can be asked for again. */
function dropActions() {
  for (const button of document.querySelectorAll(".about button:last-child")) button.remove();
}

/** @param {string} text */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    say("Copied");
  } catch {
    say("The browser doesn't allow copying");
  }
}

/**
 * @param {number} count
 * @param {number} seconds
 */
function rate(count, seconds) {
  return seconds > 0 ? (count / seconds).toFixed(1) : "0";
}

/** @param {number} bytes */
function megabytes(bytes) {
  return (bytes / 1e6).toFixed(bytes < 1e8 ? 1 : 0);
}

/** @param {unknown} error */
function messageOf(error) {
  return error instanceof Error ? error.message : String(error);
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = input.value.replace(/[\r\n]+$/, "");
  if (state !== "ready" || text.trim() === "") return;
  input.value = "";
  answer(text);
});
input.addEventListener("input", updateSend);
input.addEventListener("keydown", (event) => {
  // With a keyboard on the screen, Enter is the only way to a new line.
  const writes = event.shiftKey || event.isComposing || !mayHover.matches;
  if (event.key !== "Enter" || writes) return;
  event.preventDefault();
  if (!send.disabled) /** @type {HTMLFormElement} */ ($("form")).requestSubmit();
});
stop.addEventListener("click", () => engine.stop());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && state === "answering" && !settings.dialog.open) engine.stop();
});
newChat.addEventListener("click", startChat);
$("open-settings").addEventListener("click", () => settings.open());

load();
