/** Methods of the server by the kind of data that they take. */

import type { Method } from "@trimtab/client";

import { fieldsOf, type Field, type Schema } from "./forms.js";
import { dataForm, kindOf, type DataForm } from "./rows.js";

export interface Offer {
  name: string;
  summary: string;
  /** The field of the request that takes the data. */
  data: string;
  form: DataForm;
  kind: string;
  fields: Field[];
}

/** Kinds of data in words, in the order in which they are offered. */
const KINDS: readonly [string, string, string][] = [
  ["positive,negative", "Pairs of texts", "One side shows more of what you want, the other less of it."],
  ["text,label", "Texts with labels", "Each text has a class: harmful and harmless, weekdays by name, relations of facts."],
  ["input,output", "A task", "What is asked about, and the answer: cat and cats."],
  ["text,answer", "Prompts with answers", "Each prompt has the answer that the model should give."],
  ["text,episode", "Prompts of an agent", "Each belongs to an episode in which an action has to be chosen."],
  ["text", "Texts", "Each is an example by itself."],
  ["lines", "Words or prompts, one a line", "A category's words as they follow other text, or prompts."],
];
/** Asked for elsewhere on the page. */
const ELSEWHERE = ["name", "description"];

export function offerOf(method: Method): Offer {
  const request = method.request as Schema;
  const form = dataForm(request, method.data);
  return { name: method.name, summary: method.summary, data: method.data, form, kind: kindOf(form), fields: fieldsOf(request, [...ELSEWHERE, method.data]) };
}

export function kindsOf(offers: readonly Offer[]): { kind: string; title: string; says: string }[] {
  const there = [...new Set(offers.map((one) => one.kind))];
  const place = (kind: string) => KINDS.findIndex(([name]) => name === kind) + 1 || KINDS.length + 1;
  return there
    .sort((a, b) => place(a) - place(b))
    .map((kind) => {
      const known = KINDS.find(([name]) => name === kind);
      return { kind, title: known?.[1] ?? kind.split(",").join(" and "), says: known?.[2] ?? "" };
    });
}

/** Two lines of what could be pasted. */
export function example(form: DataForm): string {
  if (form.columns === null) {
    return " Monday\n Tuesday";
  }
  const names = form.columns.filter((one) => one.required).map((one) => one.name);
  const SAMPLES: Record<string, string> = { positive: '"What a lovely day!"', negative: '"What an awful day."', text: '"How do I bake a cake?"', label: "harmless", input: "cat", output: "cats", answer: '" Paris"', episode: "1" };
  return `${names.join(",")}\n${names.map((name) => SAMPLES[name] ?? "…").join(",")}`;
}

/** A sentence for a summary that begins in lower case and has no end. */
export function sentence(summary: string): string {
  return `${summary.charAt(0).toUpperCase()}${summary.slice(1)}${/[.!?]$/.test(summary) ? "" : "."}`;
}
