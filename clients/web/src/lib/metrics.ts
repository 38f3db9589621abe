/** Prometheus' text format, as far as the page needs it. */

export interface Row {
  name: string;
  labels: Record<string, string>;
  value: number;
}

export function rowsOf(text: string): Row[] {
  const rows: Row[] = [];
  for (const line of text.split("\n")) {
    const found = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(line);
    if (found === null) {
      continue;
    }
    const labels: Record<string, string> = {};
    for (const pair of (found[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[pair[1] as string] = (pair[2] as string).replace(/\\(.)/g, (_, c: string) => (c === "n" ? "\n" : c));
    }
    rows.push({ name: found[1] as string, labels, value: Number(found[3]) });
  }
  return rows;
}

/** Sum of the rows of a name whose labels are as given. */
export function sum(rows: readonly Row[], name: string, labels: Record<string, string> = {}): number {
  let total = 0;
  for (const row of rows) {
    if (row.name === name && Object.entries(labels).every(([key, value]) => row.labels[key] === value)) {
      total += row.value;
    }
  }
  return total;
}

/** Value by one label, largest first. */
export function by(rows: readonly Row[], name: string, label: string): { key: string; value: number }[] {
  const found = new Map<string, number>();
  for (const row of rows) {
    if (row.name === name) {
      const key = row.labels[label] ?? "";
      found.set(key, (found.get(key) ?? 0) + row.value);
    }
  }
  return [...found].map(([key, value]) => ({ key, value })).sort((a, b) => b.value - a.value);
}
