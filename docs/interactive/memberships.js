// Memberships as the graph gives them, and what follows from them. A grouping's description says which groups a token
// sees: those in the window around its cell. Groups of one colour (row mod window, column mod window) occur once there.

/** Carry values of the groups to the tokens of one grouping: Float32Array of all tokens. */
export function upsample(grouping, memberships, values) {
  const [rows, columns] = grouping.tokens;
  const [groupRows, groupColumns] = grouping.groups;
  const [high, wide] = grouping.window;
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
          sum += memberships[(token * high + (i % high)) * wide + (j % wide)] * values[i * groupColumns + j];
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

/** The lines between tokens of different labels, in units of tokens; with `only`, those around one label. */
export function borders(labels, [rows, columns], only = null) {
  const path = new Path2D();
  const differ = (a, b) => labels[a] !== labels[b] && (only === null || labels[a] === only || labels[b] === only);
  for (let r = 0; r < rows; r++) {
    for (let c = 0; c < columns; c++) {
      const token = r * columns + c;
      if (c + 1 < columns && differ(token, token + 1)) {
        path.moveTo(c + 1, r);
        path.lineTo(c + 1, r + 1);
      }
      if (r + 1 < rows && differ(token, token + columns)) {
        path.moveTo(c, r + 1);
        path.lineTo(c + 1, r + 1);
      }
    }
  }
  return path;
}
