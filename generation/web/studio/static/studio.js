// The page: make, watch, turn, keep. What a person or a model wrote goes into text nodes only.

import { parsePly } from "./ply.js";
import { FRONT, SplatView } from "./view.js";
import { showMiner } from "./miner.js";

const EXAMPLES = ["a red cube", "a blue chair", "a green mug", "a yellow house", "a purple mushroom", "a white rocket"];
// Any other stage is a generator's, which has its name.
const STAGES = { receiving: "received", queued: "waiting", paused: "paused", text_to_image: "drawing the picture",
  background: "cutting it out", self_check: "scoring it", candidates: "making the others" };
const PART_NAMES = { iqa: "quality", alignment: "alignment", ssim: "SSIM", lpips: "LPIPS" };

const byId = (id) => document.getElementById(id);
/** An element with properties and children; text is text. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made && name !== "list") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

let view = null, results = [], making = new Map(), shown = null, filter = "all", picture = null;
const own = new Set(); // ids of what was asked for here

// ---- the service's answers ------------------------------------------------------------------------------------------

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("the service does not answer");
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  throw new Error(body?.error ? [body.error.field, body.error.message].filter(Boolean).join(": ") : `HTTP ${answer.status}`);
}

async function refresh() {
  const state = await (await ask("requests")).json();
  results = state.results;
  const known = making;
  making = new Map(state.in_progress.map((each) => [each.id, { ...known.get(each.id), ...each }]));
  drawProgress();
  drawGallery();
}

function listen() {
  const events = new EventSource("../events");
  events.addEventListener("progress", ({ data }) => {
    const about = JSON.parse(data), row = making.get(about.request_id);
    if (!row) return;
    Object.assign(row, { stage: about.stage, fraction: about.fraction, left: about.eta_seconds });
    drawProgress();
  });
  events.addEventListener("end", async ({ data }) => {
    const id = JSON.parse(data).request_id;
    if (making.delete(id) || own.has(id)) await refresh().then(() => selectOwn(id), () => {});
  });
  // A browser comes back by itself when the connection broke, and not after an answer such as a proxy's 502.
  events.onerror = () => { if (events.readyState === EventSource.CLOSED) setTimeout(listen, 3000); };
  events.onopen = () => refresh().then(() => { if (!shown && results.length) select(results[0]); }, () => {});
}

function selectOwn(id) {
  const result = results.find((each) => each.id === id);
  if (result && own.delete(id)) select(result);
}

async function health() {
  const line = byId("service");
  try {
    const state = await (await ask("../health")).json();
    const waiting = state.queue_depth ? `, ${state.queue_depth} waiting` : "";
    line.textContent = state.status === "ready"
      ? `${state.profile} models on ${state.device === "cpu" ? "the CPU" : state.device}, ${state.active.length} running${waiting}`
      : `${state.status}: ${state.reason}`;
  } catch (error) {
    line.textContent = error.message;
  }
}

// ---- make -----------------------------------------------------------------------------------------------------------

async function make(prompt, image, seed, candidates = "1") {
  const form = new FormData();
  if (image) form.set("prompt_image_file", image);
  else form.set("prompt", prompt);
  if (seed) form.set("seed", seed);
  if (candidates !== "1") form.set("candidates", candidates);
  const { id } = await (await ask("requests", { method: "POST", body: form })).json();
  own.add(id);
  await refresh(); // its end may have been told before this answer came
  selectOwn(id);
}

function choosePicture(file) {
  picture = file;
  byId("picture").hidden = !file;
  byId("prompt").disabled = Boolean(file);
  const image = byId("picture-shown");
  if (image.src) URL.revokeObjectURL(image.src);
  if (file) image.src = URL.createObjectURL(file);
}

/** Rows stay where they are while they change: a button that is replaced can not be pressed. */
function drawProgress() {
  const list = byId("progress");
  for (const row of [...list.children]) if (!making.has(row.dataset.id)) row.remove();
  for (const each of making.values()) {
    const row = list.querySelector(`[data-id="${each.id}"]`) ?? progressRow(each);
    const stage = STAGES[each.stage] ?? (each.stage ? "making the splat" : "waiting");
    const left = each.left == null ? "" : `, about ${Math.ceil(each.left)} s left`;
    row.querySelector("progress").value = each.fraction ?? 0;
    row.querySelector(".small").textContent = stage + left;
    showPreview(row, each);
  }
}

/** The picture of what it looks like so far: asked for when a tenth more is done, shown where there is one. */
function showPreview(row, each) {
  const at = `${each.stage} ${Math.floor((each.fraction ?? 0) * 10)}`, image = row.querySelector("img");
  if (image.dataset.at === at || [undefined, "queued", "receiving", "paused"].includes(each.stage)) return;
  image.dataset.at = at;
  const next = new Image();
  next.onload = () => { image.src = next.src; image.hidden = false; };
  next.src = `requests/${each.id}/preview.webp?${encodeURIComponent(at)}`;
}

function progressRow(each) {
  const cancel = element("button", { type: "button", onclick: () => ask(`requests/${each.id}`, { method: "DELETE" }).catch(() => {}) }, "Cancel");
  const image = element("img", { alt: "so far", hidden: true, width: 64, height: 64 });
  const words = element("div", {}, element("div", { className: "row" }, element("b", {}, each.prompt ?? "a picture"), cancel),
    element("progress", { max: 1, value: 0, "aria-label": "this stage" }), element("div", { className: "small" }));
  const row = element("div", { className: "making" }, image, words);
  row.dataset.id = each.id;
  byId("progress").prepend(row);
  return row;
}

// ---- the result -----------------------------------------------------------------------------------------------------

function facts(result) {
  const seconds = Object.values(result.seconds).reduce((sum, each) => sum + each, 0);
  const parts = Object.entries(PART_NAMES).filter(([part]) => result.parts[part] != null)
    .map(([part, name]) => `${name} ${result.parts[part].toFixed(2)}`).join(", ");
  return [
    ["Score", result.score === null ? null : result.score.toFixed(3)],
    ["Parts", parts || null],
    ["All scores", result.candidates.length > 1 ? result.candidates.map(([, score]) => (score === null ? "–" : score.toFixed(2))).join(", ") : null],
    ["Gaussians", result.num_gaussians ? result.num_gaussians.toLocaleString("en") : null],
    ["Time", seconds ? `${seconds.toFixed(1)} s` : null],
    ["Seed", String(result.seed)],
    ["Reason", result.reason],
  ].filter(([, value]) => value);
}

function drawAbout() {
  const about = byId("about");
  if (!shown) return about.replaceChildren();
  const result = shown, base = `requests/${result.id}`, name = (result.prompt ?? "picture").replace(/[^\w]+/g, "-").slice(0, 40);
  const actions = [];
  if (result.files.includes("splat.ply")) {
    actions.push(element("a", { href: `${base}/splat.ply`, download: `${name}.ply` }, "PLY"),
      element("a", { href: `${base}/splat.spz`, download: `${name}.spz` }, ".spz"),
      element("button", { onclick: (event) => film(event.target, base) }, "Film"));
  }
  if (result.prompt !== null) {
    actions.push(element("button", { onclick: () => make(result.prompt, null, "").catch(problem) }, "Another seed"));
  }
  actions.push(element("button", { onclick: () => remove(result) }, "Remove"));
  about.replaceChildren(element("div", { className: "shown" }, element("b", {}, result.prompt ?? "a picture"), " ",
    element("span", { className: result.outcome }, result.outcome),
    element("dl", { className: "facts" }, ...facts(result).flatMap(([key, value]) => [element("dt", {}, key), element("dd", {}, value)])),
    element("div", { className: "actions" }, ...actions)));
}

function film(button, base) {
  button.disabled = true;
  button.textContent = "filming…";
  const video = element("video", { controls: true, loop: true, autoplay: true, muted: true, src: `${base}/turntable.mp4` });
  video.onloadeddata = () => button.remove();
  video.onerror = () => { button.textContent = "no film"; video.remove(); };
  byId("about").append(video);
}

async function remove(result) {
  await ask(`requests/${result.id}`, { method: "DELETE" }).catch(problem);
  if (shown?.id === result.id) await select(null);
  await refresh().catch(() => {});
}

async function select(result) {
  shown = result;
  drawAbout();
  drawGallery();
  byId("tools").hidden = true;
  if (!view) return;
  const hint = byId("hint");
  view.show(null);
  hint.textContent = result ? (result.files.includes("splat.ply") ? "loading…" : result.reason ?? "no splat") : "Nothing made yet. Type a prompt.";
  if (!result?.files.includes("splat.ply")) return;
  try {
    const splat = parsePly(await (await ask(`requests/${result.id}/splat.ply`)).arrayBuffer());
    if (shown !== result) return;
    hint.textContent = "";
    byId("tools").hidden = false;
    view.look(structuredClone(FRONT));
    view.show(splat);
  } catch (error) {
    hint.textContent = error.message;
  }
}

function drawGallery() {
  const wanted = results.filter((each) => filter === "all" || each.outcome === filter);
  const focused = byId("results").contains(document.activeElement) ? document.activeElement.dataset.id : null;
  byId("results").replaceChildren(...wanted.map((result) => {
    const thumbnail = result.files.includes("thumbnail.webp") ? "thumbnail.webp" : result.files.includes("picture.webp") ? "picture.webp" : null;
    const image = thumbnail ? element("img", { src: `requests/${result.id}/${thumbnail}`, alt: "", loading: "lazy" }) : result.outcome;
    const card = element("button", { onclick: () => select(result), title: result.reason ?? "" }, element("div", { className: "picture" }, image),
      element("div", { className: "caption" }, element("span", {}, result.prompt ?? "a picture"),
        element("span", { className: result.outcome }, result.score === null ? result.outcome : `${result.outcome}, ${result.score.toFixed(2)}`)));
    if (shown?.id === result.id) card.setAttribute("aria-current", "true");
    card.dataset.id = result.id;
    return element("li", {}, card);
  }));
  if (focused) byId("results").querySelector(`[data-id="${focused}"]`)?.focus({ preventScroll: true });
  if (!wanted.length) byId("results").append(element("li", { className: "small" }, "Nothing here."));
}

// ---- turning it -----------------------------------------------------------------------------------------------------

function spin(on) {
  byId("spin").setAttribute("aria-pressed", String(on));
  let last = null;
  const step = (now) => {
    if (byId("spin").getAttribute("aria-pressed") !== "true") return;
    if (last !== null) view.look({ azimuth: view.camera.azimuth + (now - last) * 0.03 });
    last = now;
    requestAnimationFrame(step);
  };
  if (on) requestAnimationFrame(step);
}

function turnBy(dx, dy) {
  view.look({ azimuth: view.camera.azimuth - dx * 0.4, elevation: view.camera.elevation + dy * 0.4 });
}

function panBy(dx, dy) {
  const { right, up } = view._pose(), scale = view.camera.distance / Math.min(view.canvas.clientWidth, view.canvas.clientHeight);
  view.look({ pan: view.camera.pan.map((each, axis) => each - (right[axis] * dx - up[axis] * dy) * scale) });
}

function steer(canvas) {
  const pointers = new Map();
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, event);
    spin(false);
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (!before || !view.splat) return;
    const others = [...pointers.values()].filter((each) => each.pointerId !== event.pointerId);
    const dx = event.clientX - before.clientX, dy = event.clientY - before.clientY;
    if (others.length) {
      const apart = (each) => Math.hypot(each.clientX - others[0].clientX, each.clientY - others[0].clientY) || 1;
      view.look({ distance: (view.camera.distance * apart(before)) / apart(event) });
      panBy(dx / 2, dy / 2);
    } else if (event.shiftKey || event.buttons & 6) panBy(dx, dy);
    else turnBy(dx, dy);
    pointers.set(event.pointerId, event);
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (event) => pointers.delete(event.pointerId));
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    if (view.splat) view.look({ distance: view.camera.distance * Math.exp(event.deltaY * 0.0012) });
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const keys = { ArrowLeft: () => turnBy(20, 0), ArrowRight: () => turnBy(-20, 0), ArrowUp: () => turnBy(0, 20), ArrowDown: () => turnBy(0, -20),
      "+": () => view.look({ distance: view.camera.distance / 1.15 }), "-": () => view.look({ distance: view.camera.distance * 1.15 }),
      f: () => view.look(structuredClone(FRONT)), " ": () => spin(byId("spin").getAttribute("aria-pressed") !== "true") };
    if (!view.splat || !(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  });
}

// ---- start ----------------------------------------------------------------------------------------------------------

function problem(error) {
  byId("problem").textContent = error.message;
}

function route() {
  const page = location.hash === "#miner" ? "miner" : "make";
  for (const each of ["make", "miner"]) {
    byId(each).hidden = each !== page;
    if (each === page) byId(`tab-${each}`).setAttribute("aria-current", "page");
    else byId(`tab-${each}`).removeAttribute("aria-current");
  }
  showMiner(byId("miner"), page === "miner");
}

function start() {
  try {
    view = new SplatView(byId("view"));
    steer(byId("view"));
  } catch (error) {
    byId("hint").textContent = `${error.message}: splats can be made and downloaded, not turned`;
  }
  window.studio = { view }; // for tests
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    byId("problem").textContent = "";
    const prompt = byId("prompt").value.trim() || (picture ? "" : byId("prompt").placeholder);
    make(prompt, picture, byId("seed").value.trim(), byId("candidates").value).catch(problem);
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); byId("form").requestSubmit(); }
  });
  byId("examples").append(...EXAMPLES.map((each) => element("button", { type: "button", onclick: () => { choosePicture(null); byId("prompt").value = each; byId("prompt").focus(); } }, each)));
  byId("file").addEventListener("change", (event) => choosePicture(event.target.files[0] ?? null));
  byId("picture-remove").addEventListener("click", () => { byId("file").value = ""; choosePicture(null); });
  const drop = byId("drop");
  for (const kind of ["dragenter", "dragover"]) drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
  for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.remove("over"); });
  drop.addEventListener("drop", (event) => { const file = event.dataTransfer.files[0]; if (file) choosePicture(file); });
  byId("front").addEventListener("click", () => view.look(structuredClone(FRONT)));
  byId("spin").addEventListener("click", () => spin(byId("spin").getAttribute("aria-pressed") !== "true"));
  byId("background").addEventListener("change", (event) => { view.background = event.target.value.split(",").map(Number); view.draw(); });
  byId("full").addEventListener("click", () => (document.fullscreenElement ? document.exitFullscreen() : byId("stage").requestFullscreen()));
  byId("filters").addEventListener("click", ({ target }) => {
    if (!target.dataset.show) return;
    filter = target.dataset.show;
    for (const each of byId("filters").children) each.setAttribute("aria-pressed", String(each === target));
    drawGallery();
  });
  window.addEventListener("hashchange", route);
  route();
  listen();
  health();
  setInterval(() => { if (!document.hidden) health(); }, 3000);
}

start();
