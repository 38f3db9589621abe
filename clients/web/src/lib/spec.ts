/** A column of the playground, and the request that it stands for. */

import type { Intervention, Spec, Steering } from "@trimtab/client";

/** How strong: as the artifact's card says, a factor in the card's unit, or a dose in nats. */
export type Strength = { kind: "card" } | { kind: "value"; value: number; unit: string } | { kind: "dose"; kl: number };

export interface Item {
  artifact: string;
  strength: Strength;
  /** As typed: "", "4", "3, 4" or "2-5". */
  layers: string;
  prompt: "default" | "all" | "none" | "user" | "system" | "assistant";
  generation: "default" | "all" | "none";
  /** A JSON object of further fields, gates and options say. */
  extra: string;
  off: boolean;
}

export interface Column {
  /** A stored preset to start from, "" for none. */
  preset: string;
  items: Item[];
}

export interface Ask {
  mode: "chat" | "text";
  system: string;
  prompt: string;
  max_tokens: number;
  temperature: number;
  /** null: a new draw every time. */
  seed: number | null;
  n: number;
}

export interface Table {
  ask: Ask;
  columns: Column[];
}

export class Unreadable extends Error {}

export function newItem(artifact: string): Item {
  return { artifact, strength: { kind: "card" }, layers: "", prompt: "default", generation: "default", extra: "", off: false };
}

export function parseLayers(text: string): number[] | null {
  const found: number[] = [];
  for (const part of text.split(",").map((piece) => piece.trim()).filter(Boolean)) {
    const range = /^(-?\d+)(?:\s*(?:-|to)\s*(\d+))?$/.exec(part);
    if (range === null) {
      throw new Unreadable(`"${part}" is no layer. Write 4, or 3, 4, or 2-5.`);
    }
    const first = Number(range[1]);
    const last = range[2] === undefined ? first : Number(range[2]);
    if (last < first || last - first > 1000) {
      throw new Unreadable(`"${part}" is no range of layers. Write the smaller number first.`);
    }
    for (let layer = first; layer <= last; layer += 1) {
      found.push(layer);
    }
  }
  return found.length === 0 ? null : found;
}

function parseExtra(text: string): Record<string, unknown> {
  if (text.trim() === "") {
    return {};
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new Unreadable(`The further fields are not JSON: ${(error as Error).message}`);
  }
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    throw new Unreadable('The further fields must be an object, {"gate": ...} say.');
  }
  return value as Record<string, unknown>;
}

export function intervention(item: Item): Intervention {
  const layers = parseLayers(item.layers);
  const scope: Record<string, unknown> = {};
  if (item.prompt !== "default") {
    scope.prompt = item.prompt === "all" || item.prompt === "none" ? item.prompt : { roles: [item.prompt] };
  }
  if (item.generation !== "default") {
    scope.generation = item.generation;
  }
  return {
    artifact: item.artifact,
    ...(item.strength.kind === "value" ? { strength: { value: item.strength.value, unit: item.strength.unit } } : {}),
    ...(item.strength.kind === "dose" ? { strength: { kl: item.strength.kl } } : {}),
    ...(layers === null ? {} : { layers }),
    ...(Object.keys(scope).length === 0 ? {} : { scope }),
    ...parseExtra(item.extra),
  } as Intervention;
}

export function specOf(column: Column): Spec {
  return { interventions: column.items.filter((item) => !item.off).map(intervention) } as Spec;
}

/** The `steering` field of a column; null for one that changes nothing. */
export function steeringOf(column: Column): Steering | null {
  const interventions = column.items.filter((item) => !item.off).map(intervention);
  if (interventions.length === 0 && column.preset === "") {
    return null;
  }
  return {
    ...(interventions.length === 0 ? {} : { interventions }),
    ...(column.preset === "" ? {} : { preset: column.preset }),
  } as Steering;
}

export function bodyOf(ask: Ask, model: string, steering: Steering | null): Record<string, unknown> {
  const prompt =
    ask.mode === "text"
      ? { prompt: ask.prompt }
      : {
          messages: [
            ...(ask.system === "" ? [] : [{ role: "system", content: ask.system }]),
            { role: "user", content: ask.prompt },
          ],
        };
  return {
    model,
    ...prompt,
    max_tokens: ask.max_tokens,
    temperature: ask.temperature,
    ...(ask.seed === null ? {} : { seed: ask.seed }),
    ...(ask.n === 1 ? {} : { n: ask.n }),
    ...(steering === null ? {} : { steering }),
  };
}

export function pathOf(ask: Ask): string {
  return ask.mode === "chat" ? "/v1/chat/completions" : "/v1/completions";
}

export const FIRST: Table = {
  ask: { mode: "chat", system: "", prompt: "", max_tokens: 60, temperature: 0, seed: 0, n: 1 },
  columns: [],
};

/** The table as text for an address, and back. Anything that is not one is the empty table. */
export function packed(table: Table): string {
  const json = new TextEncoder().encode(JSON.stringify(table));
  return btoa(Array.from(json, (byte) => String.fromCharCode(byte)).join(""))
    .replaceAll("+", "-")
    .replaceAll("/", "_")
    .replace(/=+$/, "");
}

export function unpacked(text: string): Table | null {
  try {
    const json = Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (c) => c.charCodeAt(0));
    const found = JSON.parse(new TextDecoder().decode(json)) as Partial<Table>;
    return {
      ask: { ...FIRST.ask, ...found.ask },
      columns: (found.columns ?? []).map((column) => ({
        preset: String(column.preset ?? ""),
        items: (column.items ?? []).map((item) => ({ ...newItem(String(item.artifact)), ...item })),
      })),
    };
  } catch {
    return null;
  }
}
