// Pictures on canvases. Everything is drawn in the image's pixels and scaled to the canvas.


/** Colours of the stages on a photograph, whatever the page's scheme: thin lines need brightness. */
export const TONES = [
  [255, 190, 70],
  [70, 225, 205],
  [255, 105, 170],
];

/** A small canvas, one pixel per token, painted by `colour(token) -> [r, g, b, alpha]`. */
export function tokensAsImage([rows, columns], colour) {
  const canvas = new OffscreenCanvas(columns, rows);
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(columns, rows);
  for (let token = 0; token < rows * columns; token++) pixels.data.set(colour(token), 4 * token);
  context.putImageData(pixels, 0, 0);
  return canvas;
}

/** The photograph, dimmed where the mask is 0, with the mask's tone where it is 1. */
function drawMasked(context, photograph, mask, grid, tone, width, height) {
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.drawImage(photograph, 0, 0, width, height);
  if (mask === null) return;
  const veil = tokensAsImage(grid, (i) => [8, 10, 24, 150 * (1 - mask[i])]);
  const light = tokensAsImage(grid, (i) => [...tone, 105 * mask[i]]);
  context.drawImage(veil, 0, 0, width, height);
  context.drawImage(light, 0, 0, width, height);
}

/** A stage's mask by itself. */
export function drawCard(canvas, photograph, mask, grid, tone) {
  drawMasked(canvas.getContext("2d"), photograph, mask, grid, tone, canvas.width, canvas.height);
}

/** The large picture.
 *
 * scene: photograph, size [rows, columns], grid of the first tokens, mask or null and its tone, classes or null,
 * lines [{path, tone, thickness}] in units of tokens, spot [row, column].
 */
export function drawPicture(canvas, scene) {
  const context = canvas.getContext("2d");
  const { width, height } = canvas;
  drawMasked(context, scene.photograph, scene.mask, scene.grid, scene.tone, width, height);
  if (scene.classes !== null) {
    const found = tokensAsImage(scene.size, (i) => [110, 200, 255, 100 * scene.classes[i]]);
    context.drawImage(found, 0, 0, width, height);
  }
  context.save();
  context.scale(width / scene.grid[1], height / scene.grid[0]);
  context.lineCap = "round";
  const scale = width / (canvas.clientWidth || width); // lines are as thick on a small screen as on a large one
  const unit = (scale * scene.grid[1]) / width;
  for (const { path, tone, thickness } of scene.lines) {
    context.strokeStyle = `rgb(${tone.join(" ")})`;
    context.lineWidth = thickness * unit;
    context.stroke(path);
  }
  context.restore();
  drawSpot(context, scene.spot, width / scene.size[1], scale);
}

/** A ring around the middle of a pixel, which is `pixel` wide; `scale` makes the ring larger. */
export function drawSpot(context, [row, column], pixel, scale) {
  const [x, y] = [(column + 0.5) * pixel, (row + 0.5) * pixel];
  const [near, far] = [7 * scale, 13 * scale];
  for (const [colour, thickness] of [["rgb(0 0 0 / 70%)", 4.5], ["white", 2]]) {
    context.strokeStyle = colour;
    context.lineWidth = thickness * scale;
    context.beginPath();
    context.arc(x, y, near, 0, 2 * Math.PI);
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      context.moveTo(x + near * dx, y + near * dy);
      context.lineTo(x + far * dx, y + far * dy);
    }
    context.stroke();
  }
}
