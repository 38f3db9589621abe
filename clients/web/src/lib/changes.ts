/** Versions that took the place of others, and what that did: most drifts are an alias that somebody moved. */

export interface Effect {
  artifact?: string;
  op?: string;
  preset?: string;
  minute?: number;
  completions: number;
  tokens: number;
  kl_mean: number;
  kl_p95: number;
  entropy_change: number;
  top1_changed: number;
  repetition: number;
  /** Starts of the first and the last minute in which it was measured, in seconds since 1970. */
  first: number;
  last: number;
}

export interface Change {
  name: string;
  before: Effect;
  after: Effect;
  /** How many times as strong the later one acts. */
  ratio: number;
}

export const nameOf = (ref: string) => ref.split("@", 1)[0] ?? "";
export const versionOf = (ref: string) => Number(ref.split("@")[1] ?? 0);

/** Names whose newest measured version is another one than before, those that moved most first. */
export function changes(rows: readonly Effect[]): Change[] {
  const names = new Map<string, Effect[]>();
  for (const row of rows) {
    if (row.artifact?.includes("@")) {
      const name = `${nameOf(row.artifact)} ${row.op ?? ""}`;
      names.set(name, [...(names.get(name) ?? []), row]);
    }
  }
  const found: Change[] = [];
  for (const versions of names.values()) {
    // Of two that begin in one minute the later version is the later one, as versions count up.
    const ordered = [...versions].sort((a, b) => a.first - b.first || versionOf(a.artifact ?? "") - versionOf(b.artifact ?? ""));
    const [before, after] = ordered.slice(-2);
    if (before !== undefined && after !== undefined) {
      found.push({ name: nameOf(after.artifact ?? ""), before, after, ratio: before.kl_mean > 0 ? after.kl_mean / before.kl_mean : Infinity });
    }
  }
  return found.sort((a, b) => Math.abs(Math.log(b.ratio)) - Math.abs(Math.log(a.ratio)));
}
