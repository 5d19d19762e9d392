// One vote at a time: kept in local storage under an id of its own until the server has acknowledged it, and sent again
// after a failure or a reload. The server takes an id once, so nothing is lost and nothing counts twice.

const $ = (id) => document.getElementById(id);
const PENDING = "diffalign.vote.";
const RETRY_MS = 1500;

const state = { annotator: null, mode: "compare", defects: [], defect: 0, task: null, tags: new Map(), since: 0, busy: true };

async function call(path, options) {
  const answer = await fetch(path, options);
  if (answer.ok) return answer.json();
  const text = await answer.text();
  let detail = text;
  try { detail = JSON.parse(text).detail; } catch { /* plain text */ }
  throw Object.assign(new Error(typeof detail === "string" ? detail : text), { refused: answer.status < 500 });
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

function notice(text) {
  $("notice").textContent = text ?? "";
  $("notice").hidden = !text;
}

/** Call until the server answers; a refusal is final and is thrown. */
async function persist(path, options) {
  for (;;) {
    try {
      const answer = await call(path, options);
      notice();
      return answer;
    } catch (error) {
      if (error.refused) throw error;
      notice("The server does not answer. Your vote is kept here and sent as soon as it does.");
      await pause(RETRY_MS);
    }
  }
}

function newId() {
  // randomUUID exists on secure origins only; the app may be served over plain http within a laboratory.
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function send(vote) {
  const key = PENDING + vote.id;
  localStorage.setItem(key, JSON.stringify(vote));
  const body = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(vote) };
  try {
    await persist("/api/votes", body);
  } finally {
    localStorage.removeItem(key); // acknowledged, or refused for good
  }
}

async function sendPending() {
  for (const key of Object.keys(localStorage).filter((name) => name.startsWith(PENDING))) {
    try { await send(JSON.parse(localStorage.getItem(key))); } catch (error) { notice(`A kept vote was refused: ${error.message}`); }
  }
}

function query(values) {
  return new URLSearchParams({ annotator: state.annotator, ...values });
}

function only(id) {
  for (const other of ["welcome", "work", "end"]) $(other).hidden = other !== id;
}

async function next() {
  state.busy = true;
  const found = await persist(`/api/next?${query({})}`);
  $("progress").max = Math.max(found.total, 1);
  $("progress").value = found.done;
  $("count").textContent = `${found.done} of ${found.total}`;
  const [task, following] = found.tasks;
  if (!task) {
    state.task = null;
    $("summary").textContent = `${found.done} answered. You can close this page.`;
    $("review").disabled = found.done === 0;
    only("end");
    state.busy = false;
    return;
  }
  $("back").disabled = found.done === 0;
  await show(task);
  for (const image of following?.images ?? []) new Image().src = `/images/${image}`;
}

async function show(task) {
  state.busy = true;
  state.task = task;
  state.tags = new Map(task.images.map((image) => [image, new Set(task.given?.tags[image] ?? [])]));
  $("prompt").textContent = task.prompt;
  const count = task.images.length;
  $("images").style.setProperty("--columns", count <= 3 ? count : Math.ceil(count / 2));
  $("images").replaceChildren(...task.images.map(card));
  for (const id of ["tie", "done", "skip"]) $(id).disabled = true;
  only("work");
  const loaded = await Promise.allSettled(Array.from($("images").querySelectorAll("img"), seen));
  const broken = loaded.some((result) => result.status === "rejected");
  if (broken) notice("An image could not be shown: skip this one.");
  for (const image of $("images").querySelectorAll("img")) image.classList.toggle("small", image.naturalWidth < 256);
  for (const id of ["tie", "done"]) $(id).disabled = broken;
  $("skip").disabled = false;
  state.broken = broken;
  state.since = performance.now();
  state.busy = false;
}

/** Settles when an image has arrived; decode() would wait for ever in a tab that is not in front. */
function seen(image) {
  return new Promise((resolve, reject) => {
    const settle = () => (image.naturalWidth ? resolve() : reject(new Error("no image")));
    if (image.complete) settle();
    else image.onload = image.onerror = settle;
  });
}

function card(image, index) {
  const element = document.createElement("div");
  element.className = "card";
  element.dataset.image = image;
  element.tabIndex = 0;
  element.setAttribute("role", "button");
  element.classList.toggle("given", state.task.given?.choice === image);
  const picture = Object.assign(new Image(), { src: `/images/${image}`, alt: `image ${index + 1}`, draggable: false });
  const row = Object.assign(document.createElement("div"), { className: "row" });
  row.append(Object.assign(document.createElement("kbd"), { textContent: String(index + 1) }));
  for (const defect of state.defects) {
    const mark = Object.assign(document.createElement("button"), { className: "mark", textContent: defect });
    mark.addEventListener("click", (event) => { event.stopPropagation(); toggle(image, defect); });
    row.append(mark);
  }
  element.append(picture, row);
  element.addEventListener("click", () => act(index, false));
  draw(element);
  return element;
}

function draw(element) {
  const tags = state.tags.get(element.dataset.image);
  element.classList.toggle("marked", tags.size > 0);
  for (const mark of element.querySelectorAll(".mark")) {
    mark.setAttribute("aria-pressed", String(tags.has(mark.textContent)));
    mark.classList.toggle("current", mark.textContent === state.defects[state.defect]);
  }
}

function redraw() {
  for (const element of $("images").children) draw(element);
}

function toggle(image, defect) {
  if (state.busy || !defect) return;
  const tags = state.tags.get(image);
  if (!tags.delete(defect)) tags.add(defect);
  redraw();
}

/** What a digit or a click on an image means: in a comparison it is preferred, otherwise it is marked. */
function act(index, shift) {
  const image = state.task?.images[index];
  if (!image || state.busy) return;
  if (state.mode === "tag" || shift) toggle(image, state.defects[state.defect]);
  else vote("choice", image);
}

async function vote(verdict, choice = null) {
  if (state.busy || !state.task || (state.broken && verdict !== "skip")) return;
  state.busy = true;
  const tags = verdict === "skip" ? [] : Array.from(state.tags, ([image, names]) => [image, [...names]]).filter(([, names]) => names.length);
  const answer = {
    id: newId(), annotator: state.annotator, task: state.task.id, verdict, choice, shown: state.task.images,
    tags: Object.fromEntries(tags), seconds: Math.round(performance.now() - state.since) / 1000,
  };
  try {
    await send(answer);
    await next();
  } catch (error) {
    notice(`This vote was refused: ${error.message}`);
    state.busy = false;
  }
}

async function back() {
  if (state.busy) return;
  state.busy = true;
  const { task } = await persist(`/api/back?${query(state.task ? { before: state.task.id } : {})}`);
  if (task) await show(task);
  state.busy = false;
}

function keys(event) {
  if ($("work").hidden && $("end").hidden) return;
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat || $("keys").open) return;
  const digit = /^(?:Digit|Numpad)([1-9])$/.exec(event.code);
  const pair = state.task?.images.length === 2 && state.mode === "compare";
  const compare = state.mode === "compare";
  const letters = {
    t: () => compare && vote("tie"), s: () => vote("skip"), b: back, "?": () => $("keys").showModal(),
    d: () => { state.defect = (state.defect + 1) % Math.max(state.defects.length, 1); redraw(); },
    arrowleft: () => pair && act(0, false), arrowright: () => pair && act(1, false),
    enter: () => {
      if (!compare) vote("tags");
      else if (document.activeElement?.classList.contains("card")) document.activeElement.click();
    },
  };
  const pressed = event.key.toLowerCase();
  if (pressed === "enter" && document.activeElement?.tagName === "BUTTON") return;
  const action = digit ? () => act(Number(digit[1]) - 1, event.shiftKey) : letters[pressed];
  if (!action) return;
  event.preventDefault();
  action();
}

async function enter(name) {
  state.annotator = name;
  sessionStorage.setItem("diffalign.annotator", name); // each tab may be another person; a reload keeps it
  $("annotator").textContent = name;
  $("leave").hidden = false;
  await next();
}

async function begin() {
  const settings = await persist("/api/session");
  state.mode = settings.mode;
  state.defects = settings.tags;
  document.body.dataset.mode = settings.mode;
  $("question").textContent = settings.mode === "compare" ? "Which image is best for this caption?" : "Mark the images with defects.";
  $("tie").hidden = settings.mode === "tag";
  $("done").hidden = settings.mode !== "tag";
  for (const line of document.querySelectorAll(settings.mode === "tag" ? ".compare" : ".tag")) line.hidden = true;
  await sendPending();
  const known = sessionStorage.getItem("diffalign.annotator");
  if (known) return enter(known);
  only("welcome");
  $("name").value = localStorage.getItem("diffalign.name") ?? "";
  $("name").select(); // typing replaces the name of whoever was here before
}

$("welcome").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("name").value.trim();
  if (!name) return;
  localStorage.setItem("diffalign.name", name);
  enter(name);
});
$("leave").addEventListener("click", () => { sessionStorage.removeItem("diffalign.annotator"); location.reload(); });
$("help").addEventListener("click", () => $("keys").showModal());
$("back").addEventListener("click", back);
$("review").addEventListener("click", back);
$("skip").addEventListener("click", () => vote("skip"));
$("tie").addEventListener("click", () => vote("tie"));
$("done").addEventListener("click", () => vote("tags"));
document.addEventListener("keydown", keys);
begin().catch((error) => notice(error.message));
