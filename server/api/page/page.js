"use strict";
// Everything shown goes through textContent: nothing from the server is ever read as HTML.
const API = "/api/v1/";
const KEY = "consilium-token";
const EVERY_MS = 5000;
const open = new Set();   // studies whose details are unfolded
const at = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "on") node.addEventListener(value[0], value[1]);
    else if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((one) => one !== null && one !== undefined));
  return node;
}

function draw(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

async function ask(path) {
  const reply = await fetch(API + path, {
    headers: { Authorization: "Bearer " + sessionStorage.getItem(KEY) },
  });
  if (reply.ok) return reply;
  let words = reply.statusText;
  try { words = (await reply.json()).error; } catch { /* not ours: the status must do */ }
  throw Object.assign(new Error(words), { status: reply.status });
}

const get = async (path) => (await ask(path)).json();
const number = (value, digits = 3) => (value === null ? "—" : Number(value).toPrecision(digits));
const when = (text) => (text ? new Date(text).toLocaleString([], { dateStyle: "medium", timeStyle: "short" }) : "—");
const badge = (word) => make("span", { className: "badge " + word }, word);
const facts = (pairs) => make("dl", { className: "facts" }, ...pairs.filter(Boolean).map(
  ([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));

function table(titles, rows) {
  return make("table", {},
    make("thead", {}, make("tr", {}, ...titles.map((one) => make("th", { scope: "col" }, one)))),
    make("tbody", {}, ...rows.map((cells) => make("tr", {}, ...cells.map(
      (cell) => (cell instanceof HTMLTableCellElement ? cell : make("td", {}, cell)))))));
}

function chart(rounds, promised) {
  const wide = 1000, high = 190, left = 54, right = 54, top = 12, low = 24;
  const spent = rounds.map((one) => one.epsilon ?? 0);
  const most = Math.max(promised ?? 0, ...spent, 1e-9) * 1.08;
  const crowd = Math.max(...rounds.map((one) => one.hospitals), 1);
  const step = (wide - left - right) / rounds.length;
  const x = (index) => left + step * (index + 0.5);
  const y = (value) => high - low - (high - low - top) * value / most;
  const svg = draw("svg", { class: "chart", viewBox: `0 0 ${wide} ${high}`, role: "img",
    "aria-label": `epsilon spent over ${rounds.length} rounds, and hospitals in each` });
  svg.append(draw("line", { class: "axis", x1: left, x2: wide - right, y1: high - low, y2: high - low }));
  rounds.forEach((one, index) => {
    const tall = (high - low - top) * 0.9 * one.hospitals / crowd;
    const bar = draw("rect", { class: "bar", x: x(index) - step * 0.32, width: step * 0.64,
      y: high - low - tall, height: tall, rx: 2 });
    bar.append(draw("title", {}, `${one.stage} ${one.round}: ${one.hospitals} hospitals, ε ${number(one.epsilon)}`));
    svg.append(bar);
  });
  if (promised !== null) {
    svg.append(draw("line", { class: "limit", x1: left, x2: wide - right, y1: y(promised), y2: y(promised) }));
    svg.append(draw("text", { x: wide - right + 4, y: y(promised) + 4 }, `ε ${number(promised)}`));
  }
  svg.append(draw("polyline", { class: "curve", points: spent.map((one, index) => `${x(index)},${y(one)}`).join(" ") }));
  spent.forEach((one, index) => svg.append(draw("circle", { class: "dot", cx: x(index), cy: y(one), r: 2.5 })));
  svg.append(draw("text", { x: 0, y: top + 4 }, "ε spent"));
  svg.append(draw("text", { x: left, y: high - 6 }, `round 1 to ${rounds.length} · bars: hospitals (at most ${crowd})`));
  return svg;
}

async function save(study, name) {
  try {
    const blob = await (await ask(`studies/${encodeURIComponent(study)}/files/${encodeURIComponent(name)}`)).blob();
    const link = make("a", { href: URL.createObjectURL(blob), download: `${study}-${name}` });
    link.click();
    URL.revokeObjectURL(link.href);
  } catch (error) { at("pulse").textContent = error.message; }
}

async function details(study) {
  const rounds = (await get(`studies/${encodeURIComponent(study.id)}/rounds`)).rounds;
  const parts = [];
  if (rounds.length) {
    parts.push(chart(rounds, study.epsilon));
  } else parts.push(make("p", { className: "quiet" }, "No round has finished yet."));
  if (study.state === "finished") {
    const results = await get(`studies/${encodeURIComponent(study.id)}/results`);
    const statement = results.privacy;
    parts.push(facts([
      ["Guarantee", statement.guaranteed ? "differential privacy" : "none"],
      ["Unit", statement.unit], ["ε spent", number(statement.epsilon_spent)], ["δ", statement.delta],
      ["Hospitals", results.result.hospitals?.length ?? "—"]]));
    if (statement.coalition) parts.push(make("p", { className: "note quiet" }, statement.coalition));
    parts.push(make("div", { className: "files" }, ...results.files.map(
      (name) => make("button", { type: "button", on: ["click", () => save(study.id, name)] }, name))));
  }
  return parts;
}

function studyCard(study) {
  const planned = Math.max(study.rounds_planned, study.rounds_finished, 1);
  const inside = make("div", {});
  const unfolded = make("details", { open: open.has(study.id) }, make("summary", {}, "Rounds and results"), inside);
  const fill = async () => {
    try { inside.replaceChildren(...await details(study)); } catch (error) { inside.textContent = error.message; }
  };
  unfolded.addEventListener("toggle", () => {
    if (unfolded.open) { open.add(study.id); fill(); } else open.delete(study.id);
  });
  if (unfolded.open) fill();
  return make("article", { className: "card" },
    make("header", {}, make("h3", {}, study.name), badge(study.state),
      make("span", { className: "quiet" }, study.id)),
    facts([
      ["Trust", study.trust],
      ["Promised ε", number(study.epsilon)],
      ["Spent ε", number(study.epsilon_spent)],
      ["Rounds", `${study.rounds_finished} of ${study.rounds_planned}`],
      ["Approved", `${study.approved.length} of ${study.invited.length}`],
      study.pending.length ? ["Waiting for", study.pending.join(", ")] : null,
      study.refused.length ? ["Refused", study.refused.join(", ")] : null,
      ["Submitted", when(study.submitted_at)],
      study.next_attempt_at ? ["Next attempt", when(study.next_attempt_at)] : null]),
    study.state === "running" || study.state === "finished"
      ? make("progress", { max: planned, value: study.state === "finished" ? planned : study.rounds_finished,
        ariaLabel: "rounds finished" }) : null,
    study.last_error ? make("p", { className: "note bad" }, study.last_error) : null,
    unfolded);
}

function hospitalRows(found) {
  return [
    ...found.hospitals.map((one) => [
      one.name, badge(one.revoked_at ? "revoked" : one.online ? "online" : "offline"),
      when(one.enrolled_at), one.revoked_at ? "—" : when(one.certificate_expires_at),
      make("td", {}, make("code", {}, one.identity.slice(0, 16) + "…"))]),
    ...found.invited.map((one) => [one.name, badge("invited"), "—", "code until " + when(one.expires_at), "—"]),
  ];
}

const drawn = {};   // what each part shows: it is drawn anew only when that changes, so focus stays
function fillOr(place, rows, build, words) {
  const text = JSON.stringify(rows.map((one) => (Array.isArray(one) ? one.map((cell) => cell.textContent ?? cell) : one)));
  if (drawn[place] === text) return;
  drawn[place] = text;
  at(place).replaceChildren(...(rows.length ? build(rows) : [make("p", { className: "empty" }, words)]));
}

async function refresh() {
  const [status, studies, hospitals, events] = await Promise.all(
    ["status", "studies", "hospitals", "events?newest=20"].map(get));
  at("where").textContent = status.address;
  at("pulse").textContent = "as of " + new Date(status.time).toLocaleTimeString();
  const tiles = [["Hospitals", status.hospitals], ["Online now", status.online],
    ["Running", status.studies.running ?? 0], ["Offered", status.studies.offered ?? 0],
    ["Finished", status.studies.finished ?? 0]];
  at("tiles").replaceChildren(...tiles.map(
    ([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));
  fillOr("studies", studies.studies, (rows) => rows.map(studyCard),
    "None yet: consilium coordinator submit STUDY.toml");
  fillOr("hospitals", hospitalRows(hospitals),
    (rows) => [table(["Name", "State", "Joined", "Certificate until", "Fingerprint"], rows)],
    "None yet: consilium coordinator enroll NAME");
  fillOr("events", events.events, (rows) => [table(["When", "What", "Of", "By"], rows.map(
    (one) => [when(one.time), one.kind.replaceAll("_", " "), make("td", { className: "wide" }, one.subject), one.actor]))],
    "Nothing yet.");
}

function show(isIn, words = "") {
  at("door").hidden = isIn;
  at("board").hidden = at("leave").hidden = !isIn;
  at("refused").textContent = words;
  if (!isIn) at("token").focus();
}

let timer = 0;
async function live() {
  clearTimeout(timer);
  if (!sessionStorage.getItem(KEY)) return show(false);
  try {
    await refresh();
    show(true);
  } catch (error) {
    if (error.status === 401 || error.status === 403) {
      sessionStorage.removeItem(KEY);
      return show(false, error.message);
    }
    at("pulse").textContent = "not reached; trying again";
  }
  timer = setTimeout(live, EVERY_MS);
}

at("door").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, at("token").value.trim());
  at("token").value = "";
  live();
});
at("leave").addEventListener("click", () => { sessionStorage.removeItem(KEY); live(); });
live();
