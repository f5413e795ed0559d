"use strict";

const at = (id) => document.getElementById(id);
const data = JSON.parse(at("data").textContent);
const body = document.querySelector("#table tbody");
const STEP = 20; // rows that are added at once: the browser decodes only pictures on the page
const order = { by: "number", descending: false };
let limit = STEP;

// ---- the table of prompts

const chosen = (id) => Number(at(id)?.value ?? 0);
const mean = (row, model) => row.means[model][chosen("reward")];
const difference = (row) => mean(row, chosen("model")) - mean(row, chosen("against"));

function short(value, digits = 4) {
  const text = value.toPrecision(digits);
  return text.includes("e") ? String(Number(text)) : text;
}

function signed(value) {
  return (value > 0 ? "+" : "") + short(value, 3);
}

function matches(row) {
  const text = at("find").value.trim().toLowerCase();
  const category = at("category")?.value ?? "";
  const outcome = at("outcome")?.value ?? "";
  const gain = difference(row);
  return (
    row.prompt.toLowerCase().includes(text) &&
    (!category || row.category === category) &&
    (!outcome || gain * Number(outcome) > 0) &&
    Math.abs(gain) >= chosen("least")
  );
}

function rank(row) {
  if (order.by === "number") return row.number;
  return order.by === "difference" ? difference(row) : mean(row, Number(order.by));
}

function makeCell(row, model) {
  const cell = at("cell").content.cloneNode(true);
  const picture = cell.querySelector("button");
  const image = cell.querySelector("img");
  const name = data.models[model];
  const scores = data.rewards.map((reward, number) => `${reward} ${short(row.own[model][number])}`).join(", ");
  Object.assign(picture.dataset, { model: name, file: row.files[model], size: row.sizes[model], scores });
  image.alt = `${name}: ${row.prompt}`;
  image.addEventListener("load", () => showPixels(image));
  image.src = row.pictures[model];
  cell.querySelector(".name").textContent = name;
  cell.querySelector("b").textContent = short(mean(row, model));
  return cell;
}

function makeRow(row) {
  const made = at("row").content.cloneNode(true).firstElementChild;
  made.querySelector(".soft").textContent = row.number;
  made.querySelector(".prompt").textContent = row.prompt;
  made.querySelector(".chip").textContent = row.category;
  for (const model of data.models.keys()) made.append(makeCell(row, model));
  if (data.models.length > 1) {
    const gain = difference(row);
    const cell = document.createElement("td");
    cell.className = `number difference ${gain > 0 ? "gain" : gain < 0 ? "loss" : ""}`;
    cell.textContent = signed(gain);
    made.append(cell);
  }
  return made;
}

function showTable() {
  const sign = order.descending ? -1 : 1;
  const found = data.rows.filter(matches).sort((one, other) => sign * (rank(one) - rank(other)) || one.number - other.number);
  const rows = found.slice(0, limit);
  body.replaceChildren(...rows.map(makeRow));
  at("count").textContent = `${found.length} of ${data.rows.length} prompts` + (rows.length < found.length ? `, ${rows.length} shown` : "");
  at("more").hidden = rows.length === found.length;
  for (const button of document.querySelectorAll("[data-sort]")) {
    const heading = button.closest("th");
    if (button.dataset.sort !== order.by) heading.removeAttribute("aria-sort");
    else heading.setAttribute("aria-sort", order.descending ? "descending" : "ascending");
  }
}

function showFirst() {
  limit = STEP;
  showTable();
}

for (const button of document.querySelectorAll("[data-sort]"))
  button.addEventListener("click", () => {
    const by = button.dataset.sort;
    order.descending = by === order.by ? !order.descending : by !== "number";
    order.by = by;
    showFirst();
  });
at("controls").addEventListener("input", showFirst);
at("controls").addEventListener("submit", (event) => event.preventDefault());
at("more").addEventListener("click", () => {
  limit += STEP;
  showTable();
});
at("browse").hidden = false;
showTable();

// ---- one picture, large

let opened = null; // the button whose picture is shown

function showPixels(image) {
  image.classList.toggle("hard", Math.max(image.naturalWidth, image.naturalHeight) <= 128);
}

function neighbour(step) {
  const all = [...opened.closest("[data-pictures]").querySelectorAll(".picture")];
  return all[all.indexOf(opened) + step];
}

function enlarge(button) {
  opened = button;
  const { model, scores, size, file } = button.dataset;
  const small = button.querySelector("img");
  at("large").src = small.src;
  at("large").alt = small.alt;
  at("large").classList.toggle("hard", small.classList.contains("hard"));
  at("large-prompt").textContent = button.closest("[data-example]").querySelector(".prompt").textContent;
  at("large-model").textContent = model;
  at("large-scores").textContent = scores;
  at("large-size").textContent = size;
  at("original").textContent = file;
  at("original").href = file.split("/").map(encodeURIComponent).join("/");
  at("previous").disabled = !neighbour(-1);
  at("next").disabled = !neighbour(1);
  if (!at("viewer").open) at("viewer").showModal();
}

function turn(step) {
  const button = opened && neighbour(step);
  if (button) enlarge(button);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest(".picture");
  if (button) enlarge(button);
});
at("viewer").addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") turn(-1);
  if (event.key === "ArrowRight") turn(1);
});
at("viewer").addEventListener("close", () => opened?.focus());
at("large").addEventListener("click", () => at("viewer").close());
at("previous").addEventListener("click", () => turn(-1));
at("next").addEventListener("click", () => turn(1));
at("close").addEventListener("click", () => at("viewer").close());
