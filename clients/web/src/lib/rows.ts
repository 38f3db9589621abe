/** Data of a method from what people paste: JSONL, a JSON list, CSV or tabs. What is wrong is said before a job runs. */

import { resolved, type Schema } from "./forms.js";

export interface Column {
  name: string;
  required: boolean;
  description: string;
  /** A text may also be a conversation or token ids, where the data is JSON. */
  kind: "text" | "prompt" | "number";
  choices: string[];
}

/** What one row of the data is; `columns` is null where a row is a text by itself. */
export interface DataForm {
  columns: Column[] | null;
}

export type Row = Record<string, unknown> | string;

export interface Found {
  rows: Row[];
  /** Lines that cannot be used. */
  errors: string[];
  /** What may spoil the result though it can be read. */
  warnings: string[];
}

const FEWEST = 8;
const FEW_OF_A_LABEL = 4;

export function dataForm(request: Schema, field: string): DataForm {
  const items = resolved(request.properties?.[field]?.items ?? {}, request);
  if (items.properties === undefined) {
    return { columns: null };
  }
  return {
    columns: Object.entries(items.properties).map(([name, property]) => {
      const options = (property.anyOf ?? [property]).filter((one) => one.type !== "null");
      const number = options.some((one) => one.type === "integer" || one.type === "number");
      return {
        name,
        required: (items.required ?? []).includes(name),
        description: property.description ?? "",
        kind: number ? "number" : options.some((one) => one.type === "array") ? "prompt" : "text",
        choices: (options.find((one) => one.enum !== undefined)?.enum ?? []).map(String),
      };
    }),
  };
}

/** What tells kinds of data apart: the columns that every row needs. */
export function kindOf(form: DataForm): string {
  return form.columns === null ? "lines" : form.columns.filter((one) => one.required).map((one) => one.name).join(",");
}

export function readRows(text: string, form: DataForm): Found {
  const trimmed = text.trim();
  if (trimmed === "") {
    return { rows: [], errors: [], warnings: [] };
  }
  const read = trimmed.startsWith("[") ? fromJson(trimmed) : trimmed.startsWith("{") || trimmed.startsWith('"') && form.columns === null ? fromLines(trimmed) : form.columns === null ? plainLines(text) : fromTable(trimmed, form.columns);
  const found = { rows: [] as Row[], errors: [...read.errors] };
  for (const { value, where } of read.values) {
    const one = form.columns === null ? lineOf(value) : rowOf(value, form.columns);
    if (typeof one === "object" && "wrong" in one) {
      found.errors.push(`${where} ${String(one.wrong)}`);
    } else {
      found.rows.push(one);
    }
  }
  return { ...found, warnings: warn(found.rows, form) };
}

interface Read {
  values: { value: unknown; where: string }[];
  errors: string[];
}

function fromJson(text: string): Read {
  try {
    return { values: (JSON.parse(text) as unknown[]).map((value, i) => ({ value, where: `Entry ${i + 1}` })), errors: [] };
  } catch (error) {
    return { values: [], errors: [`The text is not JSON: ${(error as Error).message}`] };
  }
}

function fromLines(text: string): Read {
  const found: Read = { values: [], errors: [] };
  text.split("\n").forEach((line, i) => {
    if (line.trim() === "") {
      return;
    }
    try {
      found.values.push({ value: JSON.parse(line), where: `Line ${i + 1}` });
    } catch {
      found.errors.push(`Line ${i + 1} is not JSON.`);
    }
  });
  return found;
}

/** A leading space is a part of the text: words that follow other text begin with one. */
function plainLines(text: string): Read {
  return { values: text.split("\n").map((line, i) => ({ value: line.replace(/\r$/, ""), where: `Line ${i + 1}` })).filter((one) => one.value.trim() !== ""), errors: [] };
}

function fromTable(text: string, columns: readonly Column[]): Read {
  const cells = table(text, text.split("\n", 1)[0]?.includes("\t") ? "\t" : ",");
  const header = cells[0]?.map((cell) => cell.trim().toLowerCase()) ?? [];
  const needed = columns.filter((one) => one.required).map((one) => one.name);
  const named = needed.every((name) => header.includes(name));
  const optional = columns.filter((one) => !one.required).map((one) => one.name);
  const names = named ? header : [...needed, ...optional];
  return {
    errors: [],
    values: cells
      .map((row, i) => ({ row, where: `Row ${i + 1}` }))
      .slice(named ? 1 : 0)
      .filter(({ row }) => row.some((cell) => cell.trim() !== ""))
      .map(({ row, where }) => ({ value: Object.fromEntries(names.map((name, j) => [name, row[j]])), where })),
  };
}

/** Cells of a table with quotes as RFC 4180 has them. */
export function table(text: string, separator: string): string[][] {
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

interface Wrong {
  wrong: string;
}

function lineOf(value: unknown): string | Wrong {
  if (typeof value === "object" && value !== null && typeof (value as { text?: unknown }).text === "string") {
    return (value as { text: string }).text;
  }
  return typeof value === "string" && value.trim() !== "" ? value : { wrong: "is no text." };
}

function rowOf(value: unknown, columns: readonly Column[]): Record<string, unknown> | Wrong {
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    return { wrong: "is no object with fields." };
  }
  const given = value as Record<string, unknown>;
  const row: Record<string, unknown> = {};
  for (const column of columns) {
    const cell = given[column.name];
    if (cell === undefined || cell === null || cell === "") {
      if (column.required) {
        return { wrong: `lacks “${column.name}”.` };
      }
      continue;
    }
    if (typeof cell === "string" && cell.trim() === "" && column.required) {
      return { wrong: `has an empty “${column.name}”.` };
    }
    if (column.kind === "number") {
      const number = Number(cell);
      if (!Number.isFinite(number)) {
        return { wrong: `has “${String(cell)}” as “${column.name}”, which is no number.` };
      }
      row[column.name] = number;
    } else if (column.choices.length > 0 && !column.choices.includes(String(cell))) {
      return { wrong: `has “${String(cell)}” as “${column.name}”, which must be ${column.choices.join(", ")}.` };
    } else if (typeof cell === "string" || (column.kind === "prompt" && Array.isArray(cell))) {
      row[column.name] = cell;
    } else {
      return { wrong: `has a “${column.name}” that is no text.` };
    }
  }
  return row;
}

const plural = (count: number, one: string, many: string) => (count === 1 ? one : many.replace("N", String(count)));

function warn(rows: readonly Row[], form: DataForm): string[] {
  const warnings: string[] = [];
  if (rows.length === 0) {
    return warnings;
  }
  const twice = rows.length - new Set(rows.map((row) => JSON.stringify(row))).size;
  if (twice > 0) {
    warnings.push(`${plural(twice, "One stands", "N stand")} in it twice. A copy in another split makes scores look better than they are.`);
  }
  if (rows.length < FEWEST) {
    warnings.push(`${rows.length} are few. From about forty on, the result is steady.`);
  }
  if (form.columns === null) {
    return warnings;
  }
  const objects = rows as readonly Record<string, unknown>[];
  const split = objects.filter((row) => row.split !== undefined).length;
  if (split > 0 && split < rows.length) {
    warnings.push(`${split} of ${rows.length} rows name a split. Give it for all of them or for none.`);
  }
  if (kindOf(form) === "positive,negative") {
    warnings.push(...contrast(objects));
  }
  if (form.columns.some((one) => one.name === "label")) {
    warnings.push(...labels(objects, form.columns.some((one) => one.name === "label" && one.required)));
  }
  return warnings;
}

function contrast(pairs: readonly Record<string, unknown>[]): string[] {
  const warnings: string[] = [];
  const text = (value: unknown) => (typeof value === "string" ? value : JSON.stringify(value));
  const same = pairs.filter((pair) => text(pair.positive).trim() === text(pair.negative).trim()).length;
  if (same > 0) {
    warnings.push(`${plural(same, "One pair has", "N pairs have")} the same text on both sides, which shows no contrast.`);
  }
  const mean = (side: string) => pairs.reduce((total, pair) => total + text(pair[side]).length, 0) / pairs.length;
  const ratio = mean("positive") / Math.max(mean("negative"), 1);
  if (ratio > 1.5 || ratio < 1 / 1.5) {
    warnings.push(`One side is ${(ratio > 1 ? ratio : 1 / ratio).toFixed(1)} times as long as the other, so the direction may be about length.`);
  }
  return warnings;
}

export function labelsOf(rows: readonly Row[]): Map<string, number> {
  const found = new Map<string, number>();
  for (const row of rows) {
    const label = typeof row === "object" ? row.label : undefined;
    if (typeof label === "string") {
      found.set(label, (found.get(label) ?? 0) + 1);
    }
  }
  return found;
}

function labels(rows: readonly Record<string, unknown>[], needed: boolean): string[] {
  const counts = labelsOf(rows);
  const few = [...counts].filter(([, count]) => count < FEW_OF_A_LABEL).map(([label]) => label);
  return [
    ...(needed && counts.size === 1 ? ["All rows have the same label, so there is nothing to tell apart."] : []),
    ...(few.length > 0 && rows.length >= FEWEST ? [`Fewer than ${FEW_OF_A_LABEL} rows have the label ${few.slice(0, 5).join(", ")}, too few for a test of their own.`] : []),
  ];
}
