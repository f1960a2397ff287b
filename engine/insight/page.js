"use strict";
// Tiers as they are stored, and how they are drawn: by colour and by pattern.
const NAMES = ["minor", "secondary", "core"];
const COLOURS = ["#30343b", "#e69f00", "#0072b2"];
const FILLS = ["var(--gone)", "url(#stripes)", "#0072b2"];  // in the strip
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const tokens = data.positions.length, steps = data.steps.length;
let arrays, tiers, bits, sinks = new Set(data.sinks), step = 0, playing = 0, panels = [], hovered;

// -- the arrays ---------------------------------------------------------------------------------

async function inflate(text) {
  const raw = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

function unpack(buffer) {
  const found = {};
  for (const [name, [from, length]] of Object.entries(data.blob.arrays)) {
    const bytes = buffer.slice(from, from + length);
    found[name] = name.endsWith("High") ? new Float32Array(bytes)
      : name.endsWith("Gap") ? new Uint16Array(bytes) : new Uint8Array(bytes);
  }
  return found;
}

// Each pass is stored as its change from the one before.
function unpackChanges(changes) {
  const row = data.layers * tokens;
  for (let i = row; i < changes.length; i++) changes[i] ^= changes[i - row];
  return changes;
}

const value = (level, high) => (level / 255) ** 2 * high;

// Attention on every image token for the chosen layer and head; 0 where it was not stored.
function attention(pass) {
  const found = new Float32Array(tokens), layer = at("layer").value, head = at("head").value;
  if (layer === "mean") {
    for (let i = 0; i < tokens; i++) found[i] = value(arrays.mean[pass * tokens + i], arrays.meanHigh[pass]);
    return found;
  }
  const name = head === "mean" ? "layer" : "head";
  const [, rows, count] = data.blob.shapes[name];
  const row = pass * rows + Number(name === "layer" ? layer : head);
  let token = 0;
  for (let i = row * count; i < (row + 1) * count; i++) {
    token += arrays[name + "Gap"][i];
    found[token] = value(arrays[name][i], arrays[name + "High"][row]);
  }
  return found;
}

// Of every image token and tier the share of layers, the chosen one or all, in which it is there.
function sharesNow(pass) {
  const layer = at("layer").value, base = pass * data.layers * tokens;
  const layers = layer === "mean" ? [...Array(data.layers).keys()] : [Number(layer)];
  const found = Array.from({ length: tokens }, () => [0, 0, 0]);
  for (const l of layers)
    for (let i = 0; i < tokens; i++) found[i][tiers[base + l * tokens + i]] += 1 / layers.length;
  return found;
}

// "core", or "core in 5, minor in 3 of 8 layers".
function inWords(shares) {
  if (at("layer").value !== "mean") return NAMES[shares.indexOf(1)];
  const counts = shares.map((share) => Math.round(share * data.layers));
  const named = [2, 1, 0].filter((tier) => counts[tier]).map((tier) => `${NAMES[tier]} in ${counts[tier]}`);
  return `${named.join(", ")} of ${data.layers} layers`;
}

// In how many bits a number of a token is kept, mean of keys and values and of the chosen layers.
function bitsNow(pass, token) {
  const layer = at("layer").value, base = pass * data.layers * tokens + token;
  const layers = layer === "mean" ? [...Array(data.layers).keys()] : [Number(layer)];
  const mean = layers.reduce((sum, l) => sum + bits[base + l * tokens], 0) / (2 * layers.length);
  return mean ? `, ${Number(mean.toFixed(1))} bits` : "";
}

// Mean count of each tier over the layers of a pass.
function countTiers(pass) {
  const counts = [0, 0, 0], row = data.layers * tokens;
  for (let i = pass * row; i < (pass + 1) * row; i++) counts[tiers[i]]++;
  return counts.map((n) => n / data.layers);
}

// -- drawing ------------------------------------------------------------------------------------

// Core: a blue tint in a frame. Secondary: orange stripes. Minor: dark, with a dot.
function drawTier(pen, tier, x, y, w, h) {
  pen.save();
  pen.beginPath();
  pen.rect(x, y, w, h);
  pen.clip();
  pen.globalAlpha = [0.68, 0.22, 0.3][tier];
  pen.fillStyle = COLOURS[tier];
  pen.fillRect(x, y, w, h);
  pen.globalAlpha = 1;
  pen.strokeStyle = COLOURS[tier];
  if (tier === 2) {
    pen.lineWidth = Math.min(6, Math.max(2, w / 8));
    pen.strokeRect(x + 1, y + 1, w - 2, h - 2);
  } else if (tier === 1) {
    pen.lineWidth = Math.min(5, Math.max(1.5, w / 8));
    pen.beginPath();
    for (let d = -h; d < w; d += Math.min(20, w / 2)) { pen.moveTo(x + d, y + h); pen.lineTo(x + d + h, y); }
    pen.stroke();
  } else {
    pen.fillStyle = "#8b93a1";
    pen.fillRect(x + w / 2 - 1, y + h / 2 - 1, 2, 2);
  }
  pen.restore();
}

// Dark blue to yellow, lighter throughout: readable in every kind of colour vision and in print.
function ramp(v) {
  const stops = [[0, 32, 77], [66, 78, 107], [124, 123, 120], [188, 175, 111], [255, 234, 70]];
  const i = Math.min(3, Math.floor(v * 4)), t = v * 4 - i;
  return `rgb(${stops[i].map((c, k) => Math.round(c + (stops[i + 1][k] - c) * t))})`;
}

// A patch that is of different tiers in different layers is cut, core below.
function drawShares(pen, shares, x, y, w, h) {
  let bottom = y + h;
  for (const tier of [2, 1, 0]) {
    const part = shares[tier] * h;
    bottom -= part;
    if (part > 0.01) drawTier(pen, tier, x, bottom, w, part);
  }
}

function drawPanel(panel, shares, heat, high) {
  const { columns, rows, tokens: cells, placed, seams } = panel.spec;
  for (const kind of ["kept", "heat"]) {
    const canvas = panel[kind], pen = canvas.getContext("2d");
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.filter = kind === "heat" ? "grayscale(1)" : "none";
    if (placed) pen.drawImage(panel.image, 0, 0, canvas.width, canvas.height);
    pen.filter = "none";
    const w = canvas.width / columns, h = canvas.height / rows;
    cells.forEach((token, i) => {
      const x = (i % columns) * w, y = Math.floor(i / columns) * h;
      if (kind === "kept") return drawShares(pen, shares[token], x, y, w, h);
      const masked = at("mask").checked && sinks.has(token);
      const v = masked || !high ? 0 : Math.min(1, heat[token] / high);
      pen.globalAlpha = placed ? 0.62 + 0.33 * v : 1;
      pen.fillStyle = ramp(Math.sqrt(v));
      pen.fillRect(x, y, w, h);
      pen.globalAlpha = 1;
      if (masked) { pen.strokeStyle = "#fff"; pen.strokeRect(x + w / 4, y + h / 4, w / 2, h / 2); }
    });
    pen.fillStyle = "#fff";
    for (const column of seams.columns) pen.fillRect(column * w - 1, 0, 2, canvas.height);
    for (const row of seams.rows) pen.fillRect(0, row * h - 1, canvas.width, 2);
  }
}

const percent = (x) => (100 * x).toFixed(x < 0.001 ? 3 : 2) + " %";
const label = (text) => (text === null ? "end of answer" : text ? JSON.stringify(text) : "a token without text");

function where(token) {
  for (const { spec } of panels) {
    const i = spec.tokens.indexOf(token);
    if (i >= 0 && !spec.placed) return `query ${i}`;
    if (i >= 0) {
      const name = panels.length > 1 ? ` of ${spec.title}` : "";
      return `row ${Math.floor(i / spec.columns) + 1}, column ${(i % spec.columns) + 1}${name}`;
    }
    const line = spec.newlines.indexOf(token);
    if (line >= 0) return `${spec.beside} ${line + 1} of ${spec.title}`;
  }
  return `token ${token}`;
}

function show() {
  const heat = attention(step), shares = sharesNow(step), masked = at("mask").checked;
  const visible = [...heat.keys()].filter((i) => heat[i] > 0 && !(masked && sinks.has(i)));
  visible.sort((a, b) => heat[b] - heat[a]);
  const high = visible.length ? heat[visible[0]] : 0;
  for (const panel of panels) drawPanel(panel, shares, heat, high);
  at("slider").value = step;
  at("slider").setAttribute("aria-valuetext", label(data.steps[step]));
  at("now").textContent = `token ${step + 1} of ${steps}: ${label(data.steps[step])}`;
  at("high").textContent = percent(high) + (panels[0].spec.placed ? " on one patch" : " on one query");
  const counts = [0, 1, 2].map((tier) => shares.reduce((sum, of) => sum + of[tier], 0).toFixed(0));
  at("counts").textContent = `${counts[2]} core, ${counts[1]} secondary, ${counts[0]} minor of ${tokens}`
    + (at("layer").value === "mean" ? " (mean over the layers; a patch is cut by its shares of them)" : ` in layer ${at("layer").value}`);
  at("top").replaceChildren(...visible.slice(0, 10).map((i) => {
    const item = document.createElement("li");
    item.textContent = `${where(i)}: ${percent(heat[i])}, ${inWords(shares[i])}${bitsNow(step, i)}`;
    return item;
  }));
  document.querySelectorAll("#answer span").forEach((s, i) => s.classList.toggle("now", i === step));
  tellHover(heat, shares);
  const mark = at("cursor");
  if (mark) mark.setAttribute("transform", `translate(${mark.dataset.left * 1 + mark.dataset.wide * step} 0)`);
}

function go(to) {
  step = Math.max(0, Math.min(steps - 1, to));
  show();
}

function play() {
  if (playing) { clearInterval(playing); playing = 0; }
  else {
    if (step === steps - 1) go(0);
    playing = setInterval(() => (step < steps - 1 ? go(step + 1) : play()), 450);
  }
  at("play").textContent = playing ? "\u25a0 stop" : "\u25b6 play";
  at("play").setAttribute("aria-pressed", String(Boolean(playing)));
}

// -- building -----------------------------------------------------------------------------------

async function buildPanel(spec) {
  const image = new Image();
  image.src = spec.picture;
  await image.decode();
  const panel = { spec, image };
  for (const kind of ["kept", "heat"]) {
    const figure = document.createElement("figure"), caption = document.createElement("figcaption");
    const canvas = document.createElement("canvas"), cell = Math.max(8, Math.floor(672 / spec.columns));
    canvas.width = cell * spec.columns;
    canvas.height = cell * spec.rows;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${spec.title}: ${kind}; the numbers are in the text beside`);
    canvas.addEventListener("mousemove", (event) => hover(panel, canvas, event));
    canvas.addEventListener("mouseleave", () => { hovered = undefined; show(); });
    caption.textContent = `${spec.title}, ${spec.columns} x ${spec.rows}`
      + (spec.newlines.length ? `, and ${spec.newlines.length} ${spec.beside}${spec.newlines.length > 1 ? "s" : ""}` : "");
    figure.append(canvas, caption);
    if (!spec.placed && kind === "kept") figure.prepend(Object.assign(image, { alt: "the picture", width: 160 }));
    at(kind).append(figure);
    panel[kind] = canvas;
  }
  return panel;
}

function hover({ spec }, canvas, event) {
  const box = canvas.getBoundingClientRect();
  const column = Math.floor(((event.clientX - box.left) / box.width) * spec.columns);
  const row = Math.floor(((event.clientY - box.top) / box.height) * spec.rows);
  hovered = spec.tokens[row * spec.columns + column];
  tellHover(attention(step), sharesNow(step));
}

// The numbers of the patch that is pointed at, as they are in the step that is shown.
function tellHover(heat, shares) {
  at("hover").textContent = hovered === undefined ? "Point at a patch to read its numbers."
    : `${where(hovered)}: position ${data.positions[hovered]}, ${inWords(shares[hovered])}${bitsNow(step, hovered)}, `
      + `attention ${percent(heat[hovered])}` + (sinks.has(hovered) ? ", a sink" : "");
}

function svg(name, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, worth] of Object.entries(attributes)) node.setAttribute(key, worth);
  if (text !== undefined) node.textContent = text;
  return node;
}

// Two bands: tokens per tier, and bytes kept below the line of the full cache.
function buildStrip() {
  const left = 150, wide = 1000 / steps, picture = svg("svg", { viewBox: "0 0 1160 150", role: "img" });
  picture.append(svg("title", {}, "Image tokens per tier and bytes kept after each token"));
  const stripes = svg("pattern", { id: "stripes", width: 5, height: 5, patternUnits: "userSpaceOnUse" });
  stripes.append(svg("rect", { width: 5, height: 5, class: "between" }), svg("path", { d: "M0 5L5 0", stroke: "#e69f00", "stroke-width": 2.4 }));
  picture.append(stripes);
  const most = Math.max(...data.bytes.full);
  for (let p = 0; p < steps; p++) {
    const counts = countTiers(p), x = left + p * wide, gap = Math.min(1, wide / 6);
    let y = 70;
    for (const tier of [2, 1, 0]) {
      const h = (counts[tier] / Math.max(1, tokens)) * 60;
      y -= h;
      picture.append(svg("rect", { x, y, width: wide - gap, height: h, fill: FILLS[tier] }));
    }
    const full = (data.bytes.full[p] / most) * 55, kept = (data.bytes.kept[p] / most) * 55;
    picture.append(svg("rect", { x, y: 140 - full, width: wide - gap, height: full, fill: "var(--line)" }));
    picture.append(svg("rect", { x, y: 140 - kept, width: wide - gap, height: kept, fill: "var(--bytes)" }));
  }
  const counts = countTiers(steps - 1), mb = (bytes) => (bytes / 1e6).toFixed(2) + " MB";
  const lines = [
    [20, `minor ${counts[0].toFixed(0)}`, FILLS[0]], [36, `secondary ${counts[1].toFixed(0)}`, FILLS[1]],
    [52, `core ${counts[2].toFixed(0)}`, FILLS[2]], [68, data.across ? "" : `text kept ${data.text[steps - 1]}`],
    [100, `full ${mb(data.bytes.full[steps - 1])}`, "#e4e8ee"], [116, `kept ${mb(data.bytes.kept[steps - 1])}`, "#4d7a57"],
    [132, (100 * data.bytes.kept[steps - 1] / data.bytes.full[steps - 1]).toFixed(0) + " % at the end"],
  ];
  for (const [y, text, fill] of lines) {
    picture.append(svg("text", { x: 18, y }, text));
    if (fill) picture.append(svg("rect", { x: 0, y: y - 10, width: 12, height: 10, fill }));
  }
  const cursor = svg("g", { id: "cursor", "data-left": left, "data-wide": wide });
  cursor.append(svg("rect", { x: 0, y: 4, width: wide, height: 140, fill: "none", stroke: "var(--ink)", "stroke-width": 2 }));
  picture.append(cursor);
  picture.addEventListener("click", (event) => {
    const box = picture.getBoundingClientRect();
    go(Math.floor((((event.clientX - box.left) / box.width) * 1160 - left) / wide));
  });
  at("strip").append(picture);
}

function buildText() {
  at("about").textContent = `${data.model}, cache ${data.cache}: ${tokens} ${data.across ? "features of pictures, seen through cross layers" : "image tokens"}, ${steps} steps`;
  at("question").textContent = data.prompt;
  data.steps.forEach((text, i) => {
    const span = document.createElement("span");
    span.textContent = text === null ? " \u25a1" : text || "\u00b7";
    if (text === null) span.title = "end of answer";
    span.addEventListener("click", () => go(i));
    at("answer").append(span);
  });
  at("sinks").textContent = data.sinks.length
    ? `Masked where over ten times the mean whatever is said (${data.sinks.length}). Such sinks hide the rest, and say little about the picture.`
    : "No patch is attended steadily over ten times the mean: nothing to mask.";
}

function buildChoices() {
  const add = (select, worth, text) => at(select).append(new Option(text, worth));
  add("layer", "mean", "mean of all");
  for (let l = 0; l < data.layers; l++) add("layer", l, (data.across ? "cross " : "") + l + (l === data.headLayer ? " (has heads)" : ""));
  add("head", "mean", "mean of all");
  for (let h = 0; h < data.blob.shapes.head[1]; h++) add("head", h, h);
  const fit = () => {
    at("head").disabled = at("layer").value !== String(data.headLayer);
    if (at("head").disabled) at("head").value = "mean";
    const [, , stored] = data.blob.shapes[at("head").value === "mean" ? "layer" : "head"];
    at("stored").textContent = at("layer").value !== "mean" && stored < tokens
      ? `; only the ${stored} strongest patches are in this file` : "";
    show();
  };
  for (const id of ["layer", "head", "mask"]) at(id).addEventListener("change", fit);
}

function buildCompare() {
  if (data.exact === null) return;
  at("compare").hidden = false;
  at("policy-name").textContent = data.cache.split(":")[0] + " cache";
  const fill = (id, pieces) => [...pieces, null].forEach((text, i) => {
    if (text === null && i !== data.differs) return;
    const node = document.createElement(i === data.differs ? "mark" : "span");
    node.textContent = text === null ? " \u25a1" : text;
    at(id).append(node);
  });
  const mine = data.steps.filter((text) => text !== null);
  fill("policy-answer", mine);
  fill("full-answer", data.exact);
  at("verdict").textContent = data.differs === null ? "Both answers are the same, token for token."
    : `They part at token ${data.differs + 1}: ${label(mine[data.differs] ?? null)} here, `
      + `${label(data.exact[data.differs] ?? null)} with the full cache.`;
}

function listen() {
  at("slider").max = steps - 1;
  at("slider").addEventListener("input", () => go(Number(at("slider").value)));
  at("play").addEventListener("click", play);
  document.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: step - 1, ArrowRight: step + 1, Home: 0, End: steps - 1 }[event.key];
    const busy = event.target.tagName === "SELECT" || event.ctrlKey || event.altKey || event.metaKey;
    if (busy) return;
    if (to !== undefined) go(to);
    else if (event.key === " " && !["BUTTON", "INPUT"].includes(event.target.tagName)) play();
    else return;
    event.preventDefault();
  });
}

async function start() {
  arrays = unpack(await inflate(data.blob.bytes));
  tiers = unpackChanges(arrays.tiers);
  bits = unpackChanges(arrays.bits);
  buildText();
  buildChoices();
  buildCompare();
  buildStrip();
  for (const spec of data.panels) panels.push(await buildPanel(spec));
  for (const key of document.querySelectorAll(".key")) {
    const pen = key.getContext("2d");
    for (let y = 0; y < 30; y += 15) for (let x = 0; x < 44; x += 15) drawTier(pen, Number(key.dataset.tier), x, y, 15, 15);
  }
  const pen = at("ramp").getContext("2d");
  for (let x = 0; x < 160; x++) { pen.fillStyle = ramp(Math.sqrt(x / 159)); pen.fillRect(x, 0, 1, 12); }
  listen();
  go(0);
  document.body.dataset.ready = "yes";
}

start();
