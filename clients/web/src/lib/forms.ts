/** Fields of a form from the JSON schema of what the API takes, so that every method of the server has one. */

import { parseLayers, Unreadable } from "./spec.js";

export interface Schema {
  type?: string;
  anyOf?: Schema[];
  oneOf?: Schema[];
  enum?: unknown[];
  const?: unknown;
  items?: Schema;
  properties?: Record<string, Schema>;
  required?: string[];
  $ref?: string;
  $defs?: Record<string, Schema>;
  default?: unknown;
  description?: string;
  minimum?: number;
  maximum?: number;
  exclusiveMinimum?: number;
}

export interface Field {
  /** Where it stands in the request: ["readout", "target"]. */
  path: string[];
  description: string;
  required: boolean;
  kind: "text" | "number" | "choice" | "yes" | "words" | "numbers" | "layers" | "json";
  choices: string[];
  default: unknown;
}

/** What somebody typed, by path joined with dots; "" leaves a field to the server. */
export type Typed = Record<string, string>;

export const keyOf = (field: Field) => field.path.join(".");

export function resolved(schema: Schema, root: Schema): Schema {
  return schema.$ref === undefined ? schema : (root.$defs?.[schema.$ref.split("/").at(-1) ?? ""] ?? {});
}

/** The alternatives of a schema but null, references followed. */
function alternatives(schema: Schema, root: Schema): Schema[] {
  const one = resolved(schema, root);
  const inner = one.anyOf ?? one.oneOf;
  return inner === undefined ? [one] : inner.flatMap((other) => alternatives(other, root)).filter((other) => other.type !== "null");
}

/** The fields of an object but those left out; of an object in it its own fields. */
export function fieldsOf(schema: Schema, leftOut: readonly string[], root: Schema = schema, above: string[] = [], needed = true): Field[] {
  return Object.entries(schema.properties ?? {}).flatMap(([name, property]) => {
    if (above.length === 0 && leftOut.includes(name)) {
      return [];
    }
    const path = [...above, name];
    const required = needed && (schema.required ?? []).includes(name);
    const options = alternatives(property, root);
    const only = options.length === 1 ? options[0] : undefined;
    if (only?.properties !== undefined && above.length === 0) {
      return fieldsOf(only, [], root, path, required);
    }
    const shape: Pick<Field, "kind" | "choices"> = name === "layers" ? { kind: "layers", choices: [] } : shapeOf(options);
    return [{ path, required, description: property.description ?? "", default: property.default, ...shape }];
  });
}

function shapeOf(options: readonly Schema[]): Pick<Field, "kind" | "choices"> {
  const named = options.find((one) => one.enum !== undefined);
  if (named !== undefined) {
    return { kind: "choice", choices: (named.enum ?? []).map(String) };
  }
  const types = new Set(options.map((one) => one.type));
  if (types.has("boolean")) {
    return { kind: "yes", choices: [] };
  }
  if (types.size === 1 && (types.has("integer") || types.has("number"))) {
    return { kind: "number", choices: [] };
  }
  if (types.size === 1 && types.has("string")) {
    return { kind: "text", choices: [] };
  }
  const inner = options.length === 1 ? options[0]?.items?.type : undefined;
  return { kind: inner === "string" ? "words" : inner === "number" || inner === "integer" ? "numbers" : "json", choices: [] };
}

/** What is sent for what was typed. Raises Unreadable naming the field. */
export function given(fields: readonly Field[], typed: Typed): Record<string, unknown> {
  const body: Record<string, unknown> = {};
  for (const field of fields) {
    const text = (typed[keyOf(field)] ?? "").trim();
    if (text === "") {
      if (field.required) {
        throw new Unreadable(`Fill in “${titleOf(field)}”.`);
      }
      continue;
    }
    const [first = "", second] = field.path;
    if (second === undefined) {
      body[first] = read(field, text);
    } else {
      body[first] = { ...(body[first] as object | undefined), [second]: read(field, text) };
    }
  }
  return body;
}

function read(field: Field, text: string): unknown {
  switch (field.kind) {
    case "number":
      return number(field, text);
    case "yes":
      return text === "yes";
    case "words":
      return text.split(/[\n,]/).map((word) => word.trim()).filter(Boolean);
    case "numbers":
      return text.split(/[\s,]+/).filter(Boolean).map((one) => number(field, one));
    case "layers":
      return text === "all" ? "all" : parseLayers(text);
    case "json":
      try {
        return JSON.parse(text) as unknown;
      } catch (error) {
        throw new Unreadable(`“${titleOf(field)}” is not JSON: ${(error as Error).message}`);
      }
    default:
      return text;
  }
}

function number(field: Field, text: string): number {
  const value = Number(text);
  if (!Number.isFinite(value)) {
    throw new Unreadable(`“${text}” is no number for “${titleOf(field)}”.`);
  }
  return value;
}

/** Names that say more than that of the field. */
const TITLES: Readonly<Record<string, string>> = { token: "Read at" };

/** The name of a field for people. */
export function titleOf(field: Field): string {
  const known = TITLES[keyOf(field)];
  if (known !== undefined) {
    return known;
  }
  const words = field.path.join(" ").replaceAll("_", " ");
  return words.charAt(0).toUpperCase() + words.slice(1);
}

/** What the server does where a field is left empty. */
export function usual(field: Field): string {
  const value = field.default;
  if (value === undefined || value === null || value === "" || (Array.isArray(value) && value.length === 0)) {
    return "";
  }
  return value === true ? "yes" : value === false ? "no" : Array.isArray(value) ? value.join(", ") : typeof value === "object" ? JSON.stringify(value) : String(value).replaceAll("_", " ");
}
