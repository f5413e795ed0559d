"use strict";

const at = (id) => document.getElementById(id);
const KEYS = { 1: "left", 2: "right", 0: "tie" };
let annotator = "";
let busy = false; // a vote is on its way: further keys are ignored, so that none hits a pair that was not seen

function pictureOf(pair, side) {
  return `/picture?${new URLSearchParams({ pair, side, annotator })}`;
}

async function ask(path, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const answer = await fetch(path, options);
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error);
  return content;
}

async function load(image, source) {
  image.src = source;
  await image.decode();
  image.classList.toggle("small", Math.max(image.naturalWidth, image.naturalHeight) <= 128);
}

async function show(state) {
  at("ballot").hidden = !state.pair;
  at("finished").hidden = Boolean(state.pair);
  at("progress").max = state.total;
  at("progress").value = state.done;
  at("count").textContent =
    `${state.done} of ${state.total}` + (state.left_out ? `, ${state.left_out} left out` : "");
  at("agreement").textContent = state.agreement.votes
    ? `agrees with ${state.agreement.equal} of ${state.agreement.votes} votes of others`
    : "";
  delete at("ballot").dataset.pair; // the pair that can be voted on: its pictures are on the page
  if (!state.pair) return;
  at("prompt").textContent = state.pair.prompt || "(no prompt)";
  await Promise.all(["left", "right"].map((side) => load(at(side), pictureOf(state.pair.id, side))));
  at("ballot").dataset.pair = state.pair.id;
  if (state.then) for (const side of ["left", "right"]) new Image().src = pictureOf(state.then, side);
}

async function run(request) {
  if (busy) return;
  busy = true;
  at("error").hidden = true;
  try {
    await show(await request());
  } catch (error) {
    at("error").textContent = `Not saved or not loaded: ${error.message}. Reload the page to try again.`;
    at("error").hidden = false;
  } finally {
    busy = false;
  }
}

function vote(choice) {
  const { pair } = at("ballot").dataset;
  if (pair) run(() => ask("/api/vote", { annotator, pair, choice }));
}

const undo = () => run(() => ask("/api/undo", { annotator }));

function enter(name) {
  annotator = name.trim();
  at("who").hidden = Boolean(annotator);
  document.querySelector("footer").hidden = !annotator;
  at("annotator").textContent = annotator;
  if (annotator) run(() => ask(`/api/next?annotator=${encodeURIComponent(annotator)}`));
  else at("name").focus();
}

at("who").addEventListener("submit", (event) => {
  event.preventDefault();
  localStorage.setItem("annotator", at("name").value);
  enter(at("name").value);
});
at("leave").addEventListener("click", () => {
  localStorage.removeItem("annotator");
  location.reload();
});
at("undo").addEventListener("click", undo);
at("undo-last").addEventListener("click", undo);
for (const button of document.querySelectorAll("[data-choice]"))
  button.addEventListener("click", () => vote(button.dataset.choice));
document.addEventListener("keydown", (event) => {
  if (!annotator || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in KEYS) vote(KEYS[event.key]);
  else if (event.key.toLowerCase() === "u") undo();
});
enter(localStorage.getItem("annotator") || "");
