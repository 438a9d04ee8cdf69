// The page: what is chosen, and what is redrawn when it changes.

import { TONES, drawCard, drawPicture } from "./drawing.js";
import { borders, maskOfGroup } from "./memberships.js";
import { MissingPart, Network } from "./network.js";
import { drawInPixels, drawInUnits, drawWheel, turns } from "./phases.js";

const byId = (id) => document.getElementById(id);
const percent = (x) => `${Math.round(100 * x)} %`;
const STEP = 2; // pixels that an arrow key moves the spot by
const LEAP = 10; // with Shift
const GAMMA = 0.7;

const state = {
  network: null,
  shown: null, // the image: what showImage keeps of it
  kept: new Map(),
  spot: [0, 0],
  stage: 3,
  wave: 2,
};

// ---------------------------------------------------------------- controls made from what the network says of itself

/** A radio button or checkbox in a label, before what else is in it. */
function option(type, name, value, checked, onChange) {
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type, name, value, checked });
  input.addEventListener("change", () => onChange(input));
  label.append(input);
  return label;
}

function element(tag, properties) {
  return Object.assign(document.createElement(tag), properties);
}

function buildControls({ images, groupings, waves, size }) {
  images.forEach((image, i) => {
    const label = option("radio", "image", i, i === 0, () => showImage(i));
    label.className = "tile";
    label.append(element("img", { src: `assets/${image.file}`, alt: "", width: size[1], height: size[0] }));
    label.append(element("span", { textContent: image.title }));
    byId("images").append(label);
  });
  groupings.forEach((grouping, i) => {
    const name = `Stage ${i + 1}`;
    const card = option("radio", "stage", i + 1, i + 1 === state.stage, () => chooseStage(i + 1));
    card.className = "tile card";
    card.style.setProperty("--tone", `var(--stage${i + 1})`);
    card.append(element("canvas", { id: `card${i + 1}`, width: 384, height: 288 }));
    const text = document.createElement("div");
    text.append(element("strong", { textContent: `${name}: ${grouping.pixels} px apart` }), element("span", { id: `text${i + 1}` }));
    card.append(text);
    byId("cards").append(card);

    const border = option("checkbox", "border", i + 1, i === groupings.length - 1, drawScene);
    const swatch = element("span", { className: "swatch" });
    swatch.style.setProperty("--tone", `rgb(${TONES[i].join(" ")})`);
    border.append(swatch, `Borders of stage ${i + 1}`);
    byId("borders").append(border);
  });
  waves.forEach((wave, i) => {
    const label = option("radio", "wave", i, i === state.wave, () => chooseWave(i));
    label.className = "tile";
    label.append(element("canvas", { id: `wave${i}`, width: size[1], height: size[0] }), element("span", { id: `wavetext${i}` }));
    byId("waves").append(label);
  });
}

// ---------------------------------------------------------------- groups and masks

/** Brightness in [0, 1], and the photograph lifted out of the dark, to look at. */
async function loadImage(file, [rows, columns]) {
  const image = element("img", { src: `assets/${file}` });
  await image.decode();
  const photograph = new OffscreenCanvas(columns, rows);
  const context = photograph.getContext("2d");
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, columns, rows);
  const brightness = Float32Array.from({ length: rows * columns }, (_, i) => pixels.data[4 * i] / 255);
  pixels.data.forEach((value, i) => (pixels.data[i] = 255 * (value / 255) ** GAMMA));
  context.putImageData(pixels, 0, 0);
  return { photograph, brightness };
}

/** Run the network on an image, once. */
async function understand(index) {
  const { described } = state.network;
  const { photograph, brightness } = await loadImage(described.images[index].file, described.size);
  byId("values").textContent = "The network looks at the image …";
  await new Promise(requestAnimationFrame);
  const started = performance.now();
  const results = await state.network.run(brightness);
  byId("picture").dataset.milliseconds = Math.round(performance.now() - started);
  return { photograph, ...results, outlines: results.labels.map((labels) => borders(labels, grid())) };
}

async function showImage(index) {
  if (!state.kept.has(index)) state.kept.set(index, await understand(index));
  state.shown = state.kept.get(index);
  moveSpot(...state.network.described.images[index].spot);
  byId("picture").dataset.image = index;
}

const grid = () => state.network.described.groupings[0].tokens;

/** The first token that holds the spot. */
function tokenOfSpot() {
  const [rows, columns] = state.network.described.size;
  const [tokenRows, tokenColumns] = grid();
  return Math.floor((state.spot[0] * tokenRows) / rows) * tokenColumns + Math.floor((state.spot[1] * tokenColumns) / columns);
}

function moveSpot(row, column) {
  const [rows, columns] = state.network.described.size;
  const inside = (x, n) => Math.min(n - 1, Math.max(0, Math.round(x)));
  state.spot = [inside(row, rows), inside(column, columns)];
  growMasks();
  drawScene();
  drawPhases();
}

/** From the spot to its group in every stage, and from there back to all that belongs to it. */
function growMasks() {
  const { groupings, classes } = state.network.described;
  const { memberships, labels, classes: found } = state.shown;
  const token = tokenOfSpot();
  state.groups = labels.map((of) => of[token]);
  state.masks = state.groups.map((group, i) => maskOfGroup(groupings, memberships, i + 1, group));
  const [rows, columns] = state.network.described.size;
  const area = (rows * columns) / (grid()[0] * grid()[1]);
  const sizes = state.masks.map((mask, i) => {
    const [, groupColumns] = groupings[i].groups;
    const place = `${Math.floor(state.groups[i] / groupColumns) + 1}, ${(state.groups[i] % groupColumns) + 1}`;
    const pixels = Math.round(area * mask.reduce((a, b) => a + b, 0));
    byId(`text${i + 1}`).textContent =
      `Group (${place}) of ${groupings[i].groups.join(" × ")}, about ${pixels} pixels; the spot belongs to it by ${percent(mask[token])}`;
    return pixels;
  });
  const coin = found[rows * columns + state.spot[0] * columns + state.spot[1]];
  const word = coin > 0.5 ? `${classes[1]} (${percent(coin)})` : `${classes[0]} (${percent(1 - coin)})`;
  byId("values").textContent =
    `Row ${state.spot[0]}, column ${state.spot[1]}: ${word}. Its groups hold about ${sizes.join(", ")} pixels.`;
}

function drawScene() {
  const { size } = state.network.described;
  const shown = [...document.querySelectorAll("input[name=border]:checked")].map((box) => Number(box.value) - 1);
  const lines = shown.map((i) => ({ path: state.shown.outlines[i], tone: TONES[i], thickness: 0.9 + 0.2 * i }));
  const chosen = state.stage - 1;
  const own = borders(state.shown.labels[chosen], grid(), state.groups[chosen]);
  lines.push({ path: own, tone: TONES[chosen], thickness: 3 });
  const classes = byId("classes").checked ? state.shown.classes.subarray(size[0] * size[1]) : null;
  const { spot, masks } = state;
  const { photograph } = state.shown;
  const scene = { photograph, size, grid: grid(), mask: masks[chosen], tone: TONES[chosen], classes, lines, spot };
  drawPicture(byId("picture"), scene);
  masks.forEach((mask, i) => drawCard(byId(`card${i + 1}`), photograph, mask, grid(), TONES[i]));
}

function chooseStage(stage) {
  state.stage = stage;
  drawScene();
}

// ---------------------------------------------------------------- phases

const spacing = () => 2 ** Number(byId("spacing").value);
const units = (x) => `${Number(x.toPrecision(3))} unit${x === 1 ? "" : "s"}`;

function drawPhases() {
  const { waves, size } = state.network.described;
  const distance = spacing();
  byId("spacing-value").textContent = units(distance);
  byId("spacing").setAttribute("aria-valuetext", units(distance));
  waves.forEach((wave, i) => {
    drawInPixels(byId(`wave${i}`), wave.vector, distance, state.spot);
    // What meets this wave are tokens, not pixels.
    const tokens = wave.wavelength / (distance * wave.pixels);
    const text = byId(`wavetext${i}`);
    text.textContent = `${units(wave.wavelength)} = ${Number((wave.wavelength / distance).toPrecision(3))} pixels`;
    text.classList.toggle("coarse", tokens < 2);
    if (tokens < 2) text.textContent += ": too short for tokens this far apart";
  });
  const wave = waves[state.wave];
  drawInUnits(byId("space"), wave.vector, distance, state.spot, size, state.shown.photograph);
  const position = state.spot.map((x) => x * distance);
  const degrees = Math.round(360 * turns(wave.vector, ...position));
  byId("phase-values").textContent =
    `The spot lies at (${position.map((x) => Number(x.toFixed(1))).join(", ")}) units; this wave’s phase there is ${degrees}°.`;
}

function chooseWave(index) {
  state.wave = index;
  drawPhases();
}

// ---------------------------------------------------------------- where the spot is

function listen() {
  const picture = byId("picture");
  const [rows, columns] = state.network.described.size;
  const pick = (event) => {
    const box = picture.getBoundingClientRect();
    moveSpot(((event.clientY - box.top) / box.height) * rows - 0.5, ((event.clientX - box.left) / box.width) * columns - 0.5);
  };
  picture.addEventListener("pointerdown", pick);
  picture.addEventListener("pointermove", (event) => event.buttons && pick(event));
  picture.addEventListener("keydown", (event) => {
    const ways = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const way = ways[event.key];
    if (way === undefined) return;
    event.preventDefault();
    const step = event.shiftKey ? LEAP : STEP;
    moveSpot(state.spot[0] + step * way[0], state.spot[1] + step * way[1]);
  });
  byId("classes").addEventListener("change", drawScene);
  window.addEventListener("resize", drawScene);
  byId("spacing").addEventListener("input", drawPhases);
}

function tellAbout({ parameters, recipe }) {
  const { steps, batch, crop, seed, iou } = recipe;
  byId("about").textContent =
    `${parameters.toLocaleString("en")} parameters, trained for ${steps} steps of ${batch} crops of ${crop} × ${crop} pixels ` +
    `(seed ${seed}) on the upper half of the photograph by docs/examples/interactive_network.py. On the lower half, which ` +
    `it never saw, intersection over union of coins is ${(100 * iou).toFixed(1)} %.`;
}

async function start() {
  try {
    state.network = await Network.load();
    buildControls(state.network.described);
    drawWheel(byId("wheel"));
    tellAbout(state.network.described);
    await showImage(0);
    listen();
    byId("message").hidden = true;
    document.body.dataset.ready = "true";
  } catch (error) {
    byId("message").classList.add("error");
    byId("message").textContent =
      error instanceof MissingPart ? error.message : `The network could not be started: ${error.message}`;
    if (!(error instanceof MissingPart)) throw error;
  }
}

start();
