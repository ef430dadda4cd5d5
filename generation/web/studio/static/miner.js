// What the miner earns. Its figures come from the miner's own port, through the service; nothing here can change them.

import { element } from "./studio.js";

const INTERVAL_MS = 2000;
const OUTCOMES = { accepted: "delivered", declined: "failed", broken: "rejected", empty: "rejected", refused: "failed", given_up: "rejected", unknown: "" };
const SVG = "http://www.w3.org/2000/svg";

let visit = 0; // what was asked for in an earlier one is not drawn

/** Show it on `page` and keep it up to date, or stop doing so. */
export function showMiner(page, visible) {
  const own = ++visit;
  const update = async () => {
    if (own !== visit) return;
    let state = null;
    let problem = "The service does not answer.";
    try {
      const [answer, health] = await Promise.all([fetch("miner"), fetch("../health")]);
      const told = await answer.json();
      if (answer.ok) state = { ...told, engines: health.ok ? (await health.json()).engines : [] };
      else problem = told.error?.message ?? `HTTP ${answer.status}`;
    } catch {
      // It is tried again.
    }
    if (own !== visit) return;
    try {
      draw(page, state, problem);
    } catch (error) {
      draw(page, null, `The miner's figures can not be shown (${error.message}): is it of another version?`);
    }
    setTimeout(update, INTERVAL_MS);
  };
  if (visible) update();
}

function draw(page, state, problem) {
  if (!state) {
    change(page, element("div", { className: "card" }, element("h2", {}, "No miner"), element("p", { className: "small" }, problem)));
    return;
  }
  const width = Math.min(560, page.clientWidth - 60); // its text keeps its size on a phone
  change(page, warnings(state), tiles(state),
    element("div", { className: "two" }, card("Results, each 10 minutes: accepted (green), not accepted (red)", bars(state, width)), card("Scores of accepted results", dots(state, width))),
    card("Validators", validators(state), { className: "card wide", tabIndex: 0 }), // wider than a phone: keys scroll it, too
    element("div", { className: "two" }, card("In hand", held(state)), card("Generation services", services(state))),
    card("Engines of this service", engines(state)),
    card("Results as they come", outcomes(state)));
}

/** Replaces what differs, and no more: scrolled tables, the focus and what is selected stay where they are. */
function change(old, ...next) {
  const before = [...old.childNodes];
  if (before.length !== next.length) return old.replaceChildren(...next);
  before.forEach((each, i) => {
    if (each.isEqualNode(next[i])) return;
    if (each.childNodes.length && each.cloneNode().isEqualNode(next[i].cloneNode())) change(each, ...next[i].childNodes);
    else each.replaceWith(next[i]);
  });
}

const card = (title, content, more = {}) => element("section", { className: "card", ...more }, element("h2", {}, title), content);
const number = (value, digits = 0) => (value === null || value === undefined ? "–" : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }));

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 100) return `${Math.round(seconds)} s`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function warnings(state) {
  const found = [];
  if (state.status !== "ready") found.push(`The miner: ${state.status}.`);
  if (state.clock_behind !== null && Math.abs(state.clock_behind) > 5) {
    found.push(`This machine's clock is ${Math.abs(state.clock_behind).toFixed(0)} s ${state.clock_behind > 0 ? "behind" : "ahead of"} the validators': set it.`);
  }
  if (state.services && !Object.values(state.services).some(Boolean)) found.push("No generation service can take a task.");
  return element("div", { id: "warnings", role: "alert" }, ...found.map((words) => element("p", { className: "card warning" }, words)));
}

function tiles(state) {
  const hours = state.window_seconds / 3600;
  const share = state.ceiling ? (100 * state.accepted) / state.ceiling : null;
  const each = [
    [number(state.accepted), `accepted in ${number(hours)} h, ${share === null ? "–" : number(share)} % of the ceiling`],
    [number(state.reward), "reward, by the validators' own count"],
    [number(state.mean_score, 3), "mean score of accepted results"],
    [number(state.declined), "declined, each costs 10 minutes"],
    [number(state.held.length), `tasks in hand, ${number(state.queued)} waiting`],
    [number(state.unsettled), "results of unknown outcome"],
  ];
  const box = element("div", { className: "tiles" }, ...each.map(([value, what]) => element("div", { className: "tile" }, element("b", {}, value), element("span", {}, what))));
  const uid = state.uid == null ? "" : `, UID ${state.uid}`;
  const incentive = state.incentive == null ? "" : `, incentive ${number(state.incentive, 5)} (its share of what all miners earn)`;
  const about = element("p", { className: "small" }, `${state.hotkey} on ${state.network}, subnet ${state.netuid}${uid}${incentive}`);
  return element("div", {}, box, about);
}

function table(heads, rows, empty) {
  if (!rows.length) return element("p", { className: "small" }, empty);
  const cell = (tag) => (content, column) => element(tag, { className: heads[column][1] ?? "" }, content);
  return element("table", {}, element("thead", {}, element("tr", {}, ...heads.map((head, column) => cell("th")(head[0], column)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map(cell("td"))))));
}

function validators(state) {
  const rows = state.validators.map((each) => {
    const bar = element("div", { className: "bar" }, element("i", {}));
    bar.firstChild.style.width = `${Math.min(100, ((each.cooldown ?? 0) / 300) * 100)}%`;
    const left = element("div", { className: "row" }, bar, each.cooldown ? duration(each.cooldown) : "free");
    return [String(each.uid), left, number(each.accepted), number(each.submitted), number(each.declined), number(each.mean_score, 3), number(each.reward), number(each.early), number(each.candidates, 1), number(each.gain, 3)];
  });
  return table([["UID"], ["cooldown"], ["accepted", "n"], ["results", "n"], ["declined", "n"], ["mean score", "n"], ["reward", "n"], ["asked too early", "n"], ["candidates", "n"], ["gain", "n"]], rows, "No validator has answered yet.");
}

function held(state) {
  return table([["validator"], ["prompt"], ["held for", "n"]], state.held.map((each) => [`UID ${each.uid}`, each.kind, duration(each.age)]), "Nothing: all validators are on cooldown.");
}

function services(state) {
  return table([["address"], ["state"]], Object.entries(state.services).map(([name, up]) => [name, element("span", { className: up ? "delivered" : "failed" }, up ? "takes tasks" : "down")]), "None is known.");
}

function engines(state) {
  const rows = state.engines.map((each) => {
    const gib = (bytes) => number(bytes / 2 ** 30, 1);
    const memory = each.memory ? `${gib(each.memory.used_bytes)} of ${gib(each.memory.total_bytes)} GiB, ${gib(each.memory.peak_bytes)} at most` : "–";
    return [each.device, each.name ?? "–", element("span", { className: each.status === "ready" ? "delivered" : "failed" }, each.status), String(each.active.length), memory];
  });
  return table([["device"], ["name"], ["state"], ["running", "n"], ["memory"]], rows, "None.");
}

function outcomes(state) {
  const rows = state.outcomes.map((each) => [new Date(each.at * 1000).toLocaleTimeString(), `UID ${each.uid}`,
    element("span", { className: OUTCOMES[each.outcome] ?? "" }, each.outcome.replaceAll("_", " ")), number(each.score, 3), duration(each.seconds)]);
  return element("div", { id: "outcomes", tabIndex: 0 }, table([["time"], ["validator"], ["outcome"], ["score", "n"], ["sending took", "n"]], rows, "None yet."));
}

// ---- plots ----------------------------------------------------------------------------------------------------------

function drawing(width, height, label) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", label);
  const add = (tag, attributes, text) => {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    svg.append(made);
    return made;
  };
  return { svg, add };
}

const HEIGHT = 150, LEFT = 30, BOTTOM = 130, TOP = 10;

function axes(add, width, state, low, high, digits) {
  for (const share of [0, 0.5, 1]) {
    const y = BOTTOM - share * (BOTTOM - TOP);
    add("line", { x1: LEFT, x2: width, y1: y, y2: y, stroke: "var(--line)" });
    add("text", { x: LEFT - 4, y: y + 4, "text-anchor": "end" }, (low + share * (high - low)).toFixed(digits));
  }
  for (let hours = 0; hours <= 4; hours++) {
    const x = LEFT + ((width - LEFT) * hours) / 4;
    add("text", { x, y: HEIGHT - 4, "text-anchor": hours === 0 ? "start" : hours === 4 ? "end" : "middle" }, hours === 4 ? "now" : `${((4 - hours) * state.window_seconds) / 14400} h ago`);
  }
}

function bars(state, width) {
  const { svg, add } = drawing(width, HEIGHT, "Accepted and lost results over time");
  const most = 2 * Math.max(2, Math.ceil(Math.max(...state.bins.map((each) => each.accepted + each.lost)) / 2));
  axes(add, width, state, 0, most, 0);
  const step = (width - LEFT) / state.bins.length, unit = (BOTTOM - TOP) / most;
  state.bins.forEach((each, i) => {
    const x = LEFT + i * step + 1, tall = each.accepted * unit, lost = each.lost * unit;
    add("rect", { x, y: BOTTOM - tall, width: Math.max(1, step - 2), height: tall, fill: "var(--good)" });
    add("rect", { x, y: BOTTOM - tall - lost, width: Math.max(1, step - 2), height: lost, fill: "var(--bad)" });
  });
  return svg;
}

function dots(state, width) {
  const { svg, add } = drawing(width, HEIGHT, "Scores of accepted results over time");
  const scored = state.outcomes.filter((each) => each.outcome === "accepted" && each.score !== null);
  const low = Math.min(0.6, ...scored.map((each) => each.score)), high = Math.max(1, ...scored.map((each) => each.score));
  axes(add, width, state, low, high, 2);
  for (const each of scored) {
    const x = LEFT + (width - LEFT) * (1 - (state.at - each.at) / state.window_seconds);
    if (x >= LEFT) add("circle", { cx: x, cy: BOTTOM - ((each.score - low) / (high - low || 1)) * (BOTTOM - TOP), r: 3, fill: "var(--accent)", "fill-opacity": 0.75 });
  }
  return svg;
}
