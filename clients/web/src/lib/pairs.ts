/** Contrastive pairs from what people paste: JSONL, a JSON list, CSV or tabs. What is wrong is said before a job runs. */

export interface Pair {
  positive: string;
  negative: string;
  item?: string;
  split?: string;
}

export interface Found {
  pairs: Pair[];
  /** Lines that are no pair. */
  errors: string[];
  /** What may spoil the result though it can be read. */
  warnings: string[];
}

const FEWEST = 8;

export function readPairs(text: string): Found {
  const trimmed = text.trim();
  if (trimmed === "") {
    return { pairs: [], errors: [], warnings: [] };
  }
  const found = trimmed.startsWith("[") ? fromJson(trimmed) : trimmed.startsWith("{") ? fromLines(trimmed) : fromTable(trimmed);
  return { ...found, warnings: warn(found.pairs) };
}

function fromJson(text: string): Omit<Found, "warnings"> {
  try {
    const list = JSON.parse(text) as unknown[];
    return collect(list.map((value, i) => ({ value, where: `Entry ${i + 1}` })));
  } catch (error) {
    return { pairs: [], errors: [`The text is not JSON: ${(error as Error).message}`] };
  }
}

function fromLines(text: string): Omit<Found, "warnings"> {
  const values: { value: unknown; where: string }[] = [];
  const errors: string[] = [];
  text.split("\n").forEach((line, i) => {
    if (line.trim() === "") {
      return;
    }
    try {
      values.push({ value: JSON.parse(line), where: `Line ${i + 1}` });
    } catch {
      errors.push(`Line ${i + 1} is not JSON.`);
    }
  });
  const found = collect(values);
  return { pairs: found.pairs, errors: [...errors, ...found.errors] };
}

function fromTable(text: string): Omit<Found, "warnings"> {
  const rows = table(text, text.split("\n", 1)[0]?.includes("\t") ? "\t" : ",");
  const header = rows[0]?.map((cell) => cell.trim().toLowerCase()) ?? [];
  const named = header.includes("positive") && header.includes("negative");
  const names = named ? header : ["positive", "negative", "item"];
  return collect(
    rows
      .map((cells, i) => ({ cells, where: `Row ${i + 1}` }))
      .slice(named ? 1 : 0)
      .filter(({ cells }) => cells.some((cell) => cell.trim() !== ""))
      .map(({ cells, where }) => ({ value: Object.fromEntries(names.map((name, j) => [name, cells[j]])), where })),
  );
}

/** Cells of a table with quotes as RFC 4180 has them. */
function table(text: string, separator: string): string[][] {
  const rows: string[][] = [[]];
  let cell = "";
  let quoted = false;
  const close = () => {
    rows.at(-1)?.push(cell);
    cell = "";
  };
  for (let i = 0; i < text.length; i += 1) {
    const c = text[i] as string;
    if (quoted) {
      if (c === '"' && text[i + 1] === '"') {
        cell += '"';
        i += 1;
      } else if (c === '"') {
        quoted = false;
      } else {
        cell += c;
      }
    } else if (c === '"' && cell === "") {
      quoted = true;
    } else if (c === separator) {
      close();
    } else if (c === "\n") {
      close();
      rows.push([]);
    } else if (c !== "\r") {
      cell += c;
    }
  }
  close();
  return rows;
}

function collect(values: { value: unknown; where: string }[]): Omit<Found, "warnings"> {
  const pairs: Pair[] = [];
  const errors: string[] = [];
  for (const { value, where } of values) {
    const one = value as Partial<Record<keyof Pair, unknown>> | null;
    if (typeof one?.positive !== "string" || typeof one.negative !== "string") {
      errors.push(`${where} lacks a text "positive" or "negative".`);
    } else if (one.positive.trim() === "" || one.negative.trim() === "") {
      errors.push(`${where} has an empty side.`);
    } else {
      const more = (["item", "split"] as const).flatMap((name) => {
        const value = one[name];
        return typeof value === "string" && value !== "" ? [[name, value]] : [];
      });
      pairs.push({ positive: one.positive, negative: one.negative, ...Object.fromEntries(more) });
    }
  }
  return { pairs, errors };
}

function warn(pairs: Pair[]): string[] {
  const warnings: string[] = [];
  const same = pairs.filter((pair) => pair.positive.trim() === pair.negative.trim()).length;
  if (same > 0) {
    warnings.push(`${same === 1 ? "One pair has" : `${same} pairs have`} the same text on both sides, which shows no contrast.`);
  }
  const twice = pairs.length - new Set(pairs.map((pair) => `${pair.positive}\u0000${pair.negative}`)).size;
  if (twice > 0) {
    warnings.push(`${twice === 1 ? "One pair stands" : `${twice} pairs stand`} in it twice. A copy in another split makes scores look better than they are.`);
  }
  if (pairs.length > 0 && pairs.length < FEWEST) {
    warnings.push(`${pairs.length} pairs are few. From about forty on, the direction is steady.`);
  }
  const mean = (side: "positive" | "negative") => pairs.reduce((total, pair) => total + pair[side].length, 0) / Math.max(pairs.length, 1);
  const ratio = mean("positive") / Math.max(mean("negative"), 1);
  if (pairs.length > 0 && (ratio > 1.5 || ratio < 1 / 1.5)) {
    warnings.push(`One side is ${(ratio > 1 ? ratio : 1 / ratio).toFixed(1)} times as long as the other, so the direction may be about length.`);
  }
  return warnings;
}
