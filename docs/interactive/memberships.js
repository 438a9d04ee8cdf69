// Memberships as the graph gives them, and what follows from them. A grouping's description says which groups a token
// sees: those in the window around its cell, in which every colour (row and column of a group, modulo the periods) occurs
// once at most.

/** Carry values of the groups to the tokens of one grouping: Float32Array of all tokens. */
export function upsample(grouping, memberships, values) {
  const [rows, columns] = grouping.tokens;
  const [groupRows, groupColumns] = grouping.groups;
  const [high, wide] = grouping.window;
  const [down, across] = grouping.periods;
  const [cellsOfRows, cellsOfColumns] = grouping.cells;
  const result = new Float32Array(rows * columns);
  for (let r = 0; r < rows; r++) {
    const [top, bottom] = seen(cellsOfRows[r], high, groupRows);
    for (let c = 0; c < columns; c++) {
      const [left, right] = seen(cellsOfColumns[c], wide, groupColumns);
      const token = r * columns + c;
      let sum = 0;
      for (let i = top; i <= bottom; i++) {
        for (let j = left; j <= right; j++) {
          sum += memberships[(token * down + (i % down)) * across + (j % across)] * values[i * groupColumns + j];
        }
      }
      result[token] = sum;
    }
  }
  return result;
}

function seen(cell, window, groups) {
  const reach = (window - 1) / 2;
  return [Math.max(0, cell - reach), Math.min(groups - 1, cell + reach)];
}

/** Membership of every first token in one group of a stage (1, 2, ...), through all groupings before it. */
export function maskOfGroup(groupings, memberships, stage, group) {
  const [rows, columns] = groupings[stage - 1].groups;
  let values = new Float32Array(rows * columns);
  values[group] = 1;
  for (let k = stage - 1; k >= 0; k--) values = upsample(groupings[k], memberships[k], values);
  return values;
}

/** The lines between tokens of different labels, in units of tokens; with `only`, those around one label.
 *
 * Lines join the middles of the sides that part two labels, so that a staircase becomes a slope. */
export function borders(labels, [rows, columns], only = null) {
  const path = new Path2D();
  const inside = (r, c) => r >= 0 && c >= 0 && r < rows && c < columns;
  const parts = (r1, c1, r2, c2) => {
    if (!inside(r1, c1) || !inside(r2, c2)) return false;
    const [a, b] = [labels[r1 * columns + c1], labels[r2 * columns + c2]];
    return a !== b && (only === null || a === only || b === only);
  };
  for (let r = 0; r <= rows; r++) {
    for (let c = 0; c <= columns; c++) {
      // The sides that meet in the corner above token (r, c), to its left.
      const ends = [];
      if (parts(r - 1, c - 1, r - 1, c)) ends.push([c, r - 0.5]);
      if (parts(r, c - 1, r, c)) ends.push([c, r + 0.5]);
      if (parts(r - 1, c - 1, r, c - 1)) ends.push([c - 0.5, r]);
      if (parts(r - 1, c, r, c)) ends.push([c + 0.5, r]);
      for (const end of ends) {
        path.moveTo(...end);
        if (ends.length !== 2) path.lineTo(c, r);
      }
      if (ends.length === 2) path.lineTo(...ends[0]);
    }
  }
  return path;
}
