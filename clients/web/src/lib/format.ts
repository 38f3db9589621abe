/** Numbers and times as people read them. */

export function nats(value: number): string {
  const size = Math.abs(value);
  if (size > 0 && size < 0.0005) {
    return "under 0.001 nats";
  }
  return `${value.toFixed(size < 0.0995 ? 3 : 2)} nats`;
}

export function short(value: number, digits = 3): string {
  if (!Number.isFinite(value)) {
    return "–";
  }
  return Number(value.toPrecision(digits)).toString();
}

export function percent(share: number): string {
  return `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
}

export function bytes(count: number): string {
  const units = ["B", "kB", "MB", "GB"];
  const power = Math.min(Math.floor(Math.log10(Math.max(count, 1)) / 3), units.length - 1);
  return `${short(count / 1000 ** power)} ${units[power]}`;
}

export function when(time: string | number): string {
  const date = typeof time === "number" ? new Date(1000 * time) : new Date(time);
  return date.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}

/** "0-5, 8": sorted numbers with their runs joined. */
export function runs(numbers: readonly number[]): string {
  const parts: string[] = [];
  for (let i = 0; i < numbers.length; i += 1) {
    const first = numbers[i] as number;
    let last = first;
    while (numbers[i + 1] === last + 1) {
      i += 1;
      last = numbers[i] as number;
    }
    parts.push(last > first + 1 ? `${first}-${last}` : last > first ? `${first}, ${last}` : `${first}`);
  }
  return parts.join(", ");
}
