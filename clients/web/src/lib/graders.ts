/** Graders that an evaluation may be started with from the page; the rest as JSON. */

import { Unreadable } from "./spec.js";

export interface GraderKind {
  kind: string;
  says: string;
  /** One thing to fill in; null for none. */
  asks: { name: string; label: string; choices: string[] | null; first: string } | null;
}

export const GRADERS: readonly GraderKind[] = [
  { kind: "refusal", says: "whether the request was answered or refused", asks: { name: "wanted", label: "Success is", choices: ["compliance", "refusal"], first: "compliance" } },
  { kind: "sentiment", says: "whether the answer is positive, negative or neutral", asks: { name: "wanted", label: "Success is", choices: ["positive", "negative", "neutral"], first: "positive" } },
  { kind: "language", says: "whether the answer is in a language", asks: { name: "language", label: "Language, as fr", choices: null, first: "fr" } },
  { kind: "regex", says: "whether a pattern is found in the answer", asks: { name: "pattern", label: "Pattern", choices: null, first: "" } },
  { kind: "length", says: "whether the answer has at most so many words", asks: { name: "most", label: "Most words", choices: null, first: "40" } },
  { kind: "whole", says: "whether the answer is whole and not broken", asks: null },
  { kind: "JSON", says: "any grader of the server, written as JSON", asks: { name: "json", label: "Grader", choices: null, first: '{"kind": "choice", "correct": ["yes"]}' } },
];

export function graderOf(kind: string, value: string): Record<string, unknown> {
  const asks = GRADERS.find((one) => one.kind === kind)?.asks ?? null;
  if (asks === null) {
    return { kind };
  }
  if (value.trim() === "") {
    throw new Unreadable(`Fill in “${asks.label}”.`);
  }
  if (kind === "JSON") {
    try {
      return JSON.parse(value) as Record<string, unknown>;
    } catch (error) {
      throw new Unreadable(`The grader is not JSON: ${(error as Error).message}`);
    }
  }
  if (kind === "length") {
    const most = Number(value);
    if (!Number.isInteger(most) || most < 1) {
      throw new Unreadable(`“${value}” is no number of words.`);
    }
    return { kind, most };
  }
  return { kind, [asks.name]: value.trim() };
}

/** Doses as people type them: "1, 2" or "0.5 1 -1". */
export function doses(text: string): number[] {
  const found = text.split(/[\s,;]+/).filter(Boolean).map((one) => {
    const dose = Number(one);
    if (!Number.isFinite(dose) || dose === 0) {
      throw new Unreadable(`“${one}” is no dose. Write numbers other than 0; the untouched model is measured anyway.`);
    }
    return dose;
  });
  if (found.length === 0) {
    throw new Unreadable("Write at least one dose.");
  }
  return [...new Set(found)];
}

export const linesOf = (text: string) => text.split("\n").map((line) => line.trim()).filter(Boolean);
