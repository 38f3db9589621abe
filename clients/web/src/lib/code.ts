/** A request as a program that somebody can copy. */

import type { Spec } from "@trimtab/client";

import type { Ask } from "./spec.js";

export type Language = "curl" | "Python" | "TypeScript";
/** What can be copied: a call, or the spec as a preset is stored. */
export type Form = Language | "preset";

export function program(language: Language, base: string, path: string, body: Record<string, unknown>, key: boolean): string {
  if (language === "curl") {
    const data = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
    const header = key ? ' \\\n  -H "Authorization: Bearer $TRIMTAB_API_KEY"' : "";
    return `curl -s ${base}${path} -H 'Content-Type: application/json'${header} -d '${data}'`;
  }
  const { messages, prompt, model, ...fields } = body;
  if (language === "Python") {
    const lines = Object.entries({ model, ...fields }).map(([name, value]) => `, ${name}=${python(value)}`);
    return [
      "from trimtab_client import Client",
      "",
      `with Client(${python(base)}${key ? ', api_key="..."' : ""}) as client:`,
      `    answer = client.${messages === undefined ? "complete" : "chat"}(${python(messages ?? prompt)}${lines.join("")})`,
      "    print(answer.text)",
      "    print(answer.steering)",
    ].join("\n");
  }
  const options = key ? `{ baseUrl: ${JSON.stringify(base)}, apiKey: "..." }` : `{ baseUrl: ${JSON.stringify(base)} }`;
  return [
    'import { Client } from "@trimtab/client";',
    "",
    `const client = new Client(${options});`,
    `const answer = await client.${messages === undefined ? "complete" : "chat"}(${JSON.stringify(messages ?? prompt)}, ${JSON.stringify({ model, ...fields })});`,
    `console.log(answer.choices[0]?.${messages === undefined ? "text" : "message.content"}, answer.steering);`,
  ].join("\n");
}

/** The body of POST /v1/presets. */
export function stored(name: string, spec: Spec): string {
  return JSON.stringify({ name: name.trim() || "my-preset", spec }, null, 2);
}

export function forms(): Form[] {
  return ["curl", "Python", "TypeScript", "preset"];
}

/** A JSON value as Python writes it. */
export function python(value: unknown): string {
  if (value === null || value === undefined) {
    return "None";
  }
  if (typeof value === "boolean") {
    return value ? "True" : "False";
  }
  if (Array.isArray(value)) {
    return `[${value.map(python).join(", ")}]`;
  }
  if (typeof value === "object") {
    return `{${Object.entries(value)
      .map(([name, item]) => `${JSON.stringify(name)}: ${python(item)}`)
      .join(", ")}}`;
  }
  return JSON.stringify(value);
}

/** How a request that was asked reads in one line. */
export function summary(ask: Ask): string {
  return `${ask.max_tokens} tokens at temperature ${ask.temperature}${ask.seed === null ? "" : `, seed ${ask.seed}`}`;
}
