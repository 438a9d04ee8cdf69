// RoSE's phases: the angle w . p of a position p, in physical units, for wave vectors w of the trained network.

import { drawSpot } from "./drawing.js";

const WIDEST = 4; // the largest spacing: space is shown as far as the picture reaches with it
const TURN = 2 * Math.PI;

/** Colours of a whole turn, equally light: OKLCH with a fixed lightness and chroma. */
const WHEEL = Array.from({ length: 256 }, (_, i) => fromOklch(0.76, 0.12, (TURN * i) / 256));

/** The same as the words of an image's memory: red in the lowest byte. */
const WORDS = Uint32Array.from(WHEEL, ([r, g, b]) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0);

function fromOklch(lightness, chroma, hue) {
  const [a, b] = [chroma * Math.cos(hue), chroma * Math.sin(hue)];
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const linear = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  // A few greens lie just outside of sRGB.
  const inside = linear.map((x) => Math.min(1, Math.max(0, x)));
  return inside.map((x) => Math.round(255 * (x <= 0.0031308 ? 12.92 * x : 1.055 * x ** (1 / 2.4) - 0.055)));
}

/** The angle at a position, in turns from 0 to 1. */
export function turns(vector, row, column) {
  const angle = (vector[0] * row + vector[1] * column) / TURN;
  return angle - Math.floor(angle);
}

/** Paint a wave: the canvas's pixels lie `step` units apart. */
function paintWave(canvas, vector, step) {
  const context = canvas.getContext("2d");
  const { width, height } = canvas;
  const pixels = context.createImageData(width, height);
  const words = new Uint32Array(pixels.data.buffer);
  for (let r = 0; r < height; r++) {
    for (let c = 0; c < width; c++) words[r * width + c] = WORDS[Math.floor(256 * turns(vector, r * step, c * step))];
  }
  context.putImageData(pixels, 0, 0);
  return context;
}

/** The image's own pixels, one canvas pixel each, with a clock hand at the spot that shows its phase. */
export function drawInPixels(canvas, vector, spacing, spot) {
  const context = paintWave(canvas, vector, spacing);
  const angle = TURN * turns(vector, spot[0] * spacing, spot[1] * spacing);
  const [x, y] = [spot[1] + 0.5, spot[0] + 0.5];
  context.fillStyle = "rgb(15 17 25 / 80%)";
  context.beginPath();
  context.arc(x, y, 11, 0, TURN);
  context.fill();
  context.strokeStyle = "white";
  context.lineWidth = 2.5;
  context.lineCap = "round";
  context.beginPath();
  context.moveTo(x, y);
  context.lineTo(x + 8 * Math.cos(angle), y - 8 * Math.sin(angle));
  context.stroke();
}

/** A fixed piece of space, with the picture's frame in it. */
export function drawInUnits(canvas, vector, spacing, spot, size, photograph) {
  const perUnit = canvas.width / (WIDEST * size[1]);
  const context = paintWave(canvas, vector, 1 / perUnit);
  const [width, height] = [size[1] * spacing * perUnit, size[0] * spacing * perUnit];
  context.fillStyle = "rgb(15 17 25 / 38%)";
  context.beginPath();
  context.rect(0, 0, canvas.width, canvas.height);
  context.rect(0, 0, width, height);
  context.fill("evenodd");
  context.globalAlpha = 0.38;
  context.drawImage(photograph, 0, 0, width, height);
  context.globalAlpha = 1;
  context.strokeStyle = "white";
  context.lineWidth = 3;
  context.strokeRect(1.5, 1.5, width - 3, height - 3);
  drawSpot(context, spot, spacing * perUnit, canvas.width / (canvas.clientWidth || canvas.width));
  drawRuler(context, canvas, perUnit);
}

function drawRuler(context, canvas, perUnit) {
  const length = 200 * perUnit;
  const [x, y] = [canvas.width - length - 18, canvas.height - 22];
  context.fillStyle = "rgb(15 17 25 / 75%)";
  context.fillRect(x - 10, y - 30, length + 20, 44);
  context.fillStyle = "white";
  context.fillRect(x, y, length, 4);
  context.font = "20px system-ui, sans-serif";
  context.textAlign = "center";
  context.fillText("200 units", x + length / 2, y - 8);
}

/** The colours of a turn, 0 degrees to the right, counted against the clock. */
export function drawWheel(canvas) {
  const context = canvas.getContext("2d");
  const radius = canvas.width / 2;
  for (let i = 0; i < 256; i++) {
    context.fillStyle = `rgb(${WHEEL[i].join(" ")})`;
    context.beginPath();
    context.arc(radius, radius, radius - 1, (-TURN * (i + 1.5)) / 256, (-TURN * i) / 256);
    context.arc(radius, radius, radius * 0.5, (-TURN * i) / 256, (-TURN * (i + 1.5)) / 256, true);
    context.fill();
  }
}
