/** A column of the playground, and the request that it stands for. */

import type { Intervention, Spec, Steering } from "@trimtab/client";

import { HEATS, type Heat } from "./heat.js";

/** How strong: as the artifact's card says, a factor in the card's unit, or a dose in nats. */
export type Strength = { kind: "card" } | { kind: "value"; value: number; unit: string } | { kind: "dose"; kl: number };

export const SECTIONS = ["reasoning", "answer", "tool_call", "json"] as const;
export type Section = (typeof SECTIONS)[number];

/** A condition under which an intervention acts. What is "" is left to the probe's own card. */
export interface Gate {
  probe: string;
  threshold: string;
  direction: "" | "above" | "below";
  when: "prompt" | "token";
}

/** Limits that hold while an answer is written; null for none. */
export interface Guard {
  max_kl: number | null;
  max_repetition: number | null;
  action: "lower" | "stop";
}

export interface Item {
  artifact: string;
  strength: Strength;
  /** As typed: "", "4", "3, 4" or "2-5". */
  layers: string;
  prompt: "default" | "all" | "none" | "user" | "system" | "assistant" | "painted";
  /** Positions of prompt tokens, where they were painted. */
  painted: number[];
  generation: "default" | "all" | "none" | "sections";
  sections: Section[];
  gate: Gate | null;
  /** Options of the op as a JSON object, "" for the artifact's own. */
  options: string;
  /** A JSON object of further fields. */
  extra: string;
  off: boolean;
}

export interface Column {
  /** A stored preset to start from, "" for none. */
  preset: string;
  items: Item[];
  guard?: Guard | null;
}

/** A token to go on from: what the prompt is then, as ids, because a template would close the turn behind it. */
export interface Fork {
  ids: number[];
  text: string;
}

/** An earlier turn of a conversation. */
export interface Turn {
  role: "user" | "assistant";
  content: string;
}

export interface Ask {
  mode: "chat" | "text";
  system: string;
  /** What was said before the prompt. */
  turns: Turn[];
  prompt: string;
  max_tokens: number;
  temperature: number;
  seed: number | null;
  /** Whether the seed stays; else every run draws another. */
  locked: boolean;
  n: number;
  fork: Fork | null;
}

export interface Table {
  ask: Ask;
  columns: Column[];
  /** How answers are shown, and what the colour of a token shows. */
  view: "text" | "heat";
  by: Heat;
}

export class Unreadable extends Error {}

export function newItem(artifact: string): Item {
  return { artifact, strength: { kind: "card" }, layers: "", prompt: "default", painted: [], generation: "default", sections: [], gate: null, options: "", extra: "", off: false };
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

function parseObject(text: string, what: string, example: string): Record<string, unknown> {
  if (text.trim() === "") {
    return {};
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new Unreadable(`The ${what} are not JSON: ${(error as Error).message}`);
  }
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    throw new Unreadable(`The ${what} must be an object, ${example} say.`);
  }
  return value as Record<string, unknown>;
}

export function intervention(item: Item): Intervention {
  const layers = parseLayers(item.layers);
  const scope: Record<string, unknown> = {};
  if (item.prompt === "painted") {
    scope.prompt = item.painted.length === 0 ? "none" : selection(item.painted);
  } else if (item.prompt !== "default") {
    scope.prompt = item.prompt === "all" || item.prompt === "none" ? item.prompt : { roles: [item.prompt] };
  }
  if (item.generation === "sections") {
    if (item.sections.length === 0) {
      throw new Unreadable(`Choose at least one section in which ${item.artifact} acts.`);
    }
    scope.generation = { sections: item.sections };
  } else if (item.generation !== "default") {
    scope.generation = item.generation;
  }
  const options = parseObject(item.options, "options", '{"norm_match": true}');
  return {
    artifact: item.artifact,
    ...(item.strength.kind === "value" ? { strength: { value: item.strength.value, unit: item.strength.unit } } : {}),
    ...(item.strength.kind === "dose" ? { strength: { kl: item.strength.kl } } : {}),
    ...(layers === null ? {} : { layers }),
    ...(Object.keys(scope).length === 0 ? {} : { scope }),
    ...(item.gate === null ? {} : { gate: gateOf(item.gate) }),
    ...(Object.keys(options).length === 0 ? {} : { options }),
    ...parseObject(item.extra, "further fields", '{"override": ["model"]}'),
  } as Intervention;
}

/** Painted positions in the fewest words: windows where they are runs. */
function selection(painted: readonly number[]): Record<string, unknown> {
  const sorted = [...painted].sort((a, b) => a - b);
  const windows: [number, number][] = [];
  for (const at of sorted) {
    const last = windows.at(-1);
    if (last !== undefined && last[1] === at) {
      last[1] = at + 1;
    } else {
      windows.push([at, at + 1]);
    }
  }
  return windows.length < sorted.length ? { windows } : { positions: sorted };
}

function gateOf(gate: Gate): Record<string, unknown> {
  if (gate.probe.trim() === "") {
    throw new Unreadable("Name what the gate reads, or take the gate away.");
  }
  const threshold = Number(gate.threshold);
  if (gate.threshold.trim() !== "" && !Number.isFinite(threshold)) {
    throw new Unreadable(`"${gate.threshold}" is no threshold. Write a number, or leave it to the probe's card.`);
  }
  return {
    probe: gate.probe.trim(),
    ...(gate.threshold.trim() === "" ? {} : { threshold }),
    ...(gate.direction === "" ? {} : { direction: gate.direction }),
    ...(gate.when === "prompt" ? {} : { when: gate.when }),
  };
}

function guardOf(guard: Guard | null | undefined): { guard?: Record<string, unknown> } {
  if (!guard) {
    return {};
  }
  if (guard.max_kl === null && guard.max_repetition === null) {
    throw new Unreadable("A guard needs a largest dose or a largest repetition. Give one, or take the guard away.");
  }
  return {
    guard: {
      ...(guard.max_kl === null ? {} : { max_kl: guard.max_kl }),
      ...(guard.max_repetition === null ? {} : { max_repetition: guard.max_repetition }),
      ...(guard.action === "lower" ? {} : { action: guard.action }),
    },
  };
}

export function specOf(column: Column): Spec {
  return { interventions: column.items.filter((item) => !item.off).map(intervention), ...guardOf(column.guard) } as Spec;
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
    ...guardOf(column.guard),
  } as Steering;
}

export function bodyOf(ask: Ask, model: string, steering: Steering | null): Record<string, unknown> {
  const prompt =
    ask.fork !== null
      ? { prompt: ask.fork.ids }
      : ask.mode === "text"
        ? { prompt: ask.prompt }
        : { messages: messagesOf(ask) };
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

export function messagesOf(ask: Ask): { role: string; content: string }[] {
  return [
    ...(ask.system === "" ? [] : [{ role: "system", content: ask.system }]),
    ...ask.turns.map(({ role, content }) => ({ role, content })),
    { role: "user", content: ask.prompt },
  ];
}

export function pathOf(ask: Ask): string {
  return ask.mode === "chat" && ask.fork === null ? "/v1/chat/completions" : "/v1/completions";
}

export const FIRST: Table = {
  ask: { mode: "chat", system: "", turns: [], prompt: "", max_tokens: 60, temperature: 0, seed: 0, locked: true, n: 1, fork: null },
  columns: [],
  view: "text",
  by: "effect",
};

/** The address of a playground with one column. */
export function tryLink(column: Column): string {
  return `#/playground?t=${packed({ ...FIRST, columns: [column] })}`;
}

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
      ask: { ...FIRST.ask, ...found.ask, turns: Array.isArray(found.ask?.turns) ? found.ask.turns : [] },
      columns: (found.columns ?? []).map((column) => ({
        preset: String(column.preset ?? ""),
        guard: column.guard ?? null,
        items: (column.items ?? []).map((item) => ({ ...newItem(String(item.artifact)), ...item })),
      })),
      view: found.view === "heat" ? "heat" : "text",
      by: HEATS.some(([name]) => name === found.by) ? (found.by as Heat) : "effect",
    };
  } catch {
    return null;
  }
}
