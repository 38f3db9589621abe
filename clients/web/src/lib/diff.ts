/** What differs between two versions, one line for each field that does. */

export interface Line {
  field: string;
  before: string;
  after: string;
}

/** What says when and as what it was stored differs always and explains nothing. */
const LEFT_OUT = new Set(["ref", "version", "created_at", "aliases", "digest"]);
const DEEPEST = 4;

export function differences(before: object, after: object): Line[] {
  const found: Line[] = [];
  compare("", before, after, 0, found);
  return found;
}

function compare(path: string, before: unknown, after: unknown, depth: number, found: Line[]): void {
  if (JSON.stringify(before) === JSON.stringify(after)) {
    return;
  }
  if (isRecord(before) && isRecord(after) && depth < DEEPEST) {
    for (const name of [...new Set([...Object.keys(before), ...Object.keys(after)])].sort()) {
      if (depth > 0 || !LEFT_OUT.has(name)) {
        compare(path === "" ? name : `${path}.${name}`, before[name], after[name], depth + 1, found);
      }
    }
    return;
  }
  found.push({ field: path.replaceAll("_", " "), before: written(before), after: written(after) });
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

const LONGEST = 300;

function written(value: unknown): string {
  if (value === undefined || value === null) {
    return "–";
  }
  const text = typeof value === "string" ? value : JSON.stringify(value);
  return text.length > LONGEST ? `${text.slice(0, LONGEST)}…` : text;
}
