/** A receipt in sentences. */

import type { Receipt } from "@trimtab/client";

import { nats, runs, short } from "./format.js";

const DONE: Record<string, string> = {
  add: "added",
  ablate: "ablated",
  clamp: "clamped",
  rotate: "rotated",
  affine: "mapped",
  sign_flip: "flipped",
  mask: "masked",
  neuron_mask: "masked",
  head_mask: "masked",
  expert_mask: "masked",
  manifold: "moved along its manifold",
  patch: "patched",
};

export interface Sentence {
  text: string;
  /** "off" marks what was not done. */
  tone: "done" | "off" | "warn";
}

/** What random artifacts of the size that was applied do, by reference; in nats a token. */
export type Floors = Readonly<Record<string, number>>;

export function sentences(receipt: Receipt, floors: Floors = {}): Sentence[] {
  if (receipt.disabled) {
    return [{ text: `Nothing was applied, because ${receipt.reason ?? "steering is off"}.`, tone: "off" }];
  }
  const found: Sentence[] = receipt.applied.map((one, j) => {
    const tokens = one.tokens.prompt + one.tokens.generation;
    const where = `at ${one.layers.length === 1 ? "layer" : "layers"} ${runs(one.layers)}`;
    if (tokens === 0) {
      const why = one.gate ? "its gate stayed shut" : "its scope holds none";
      return { text: `${one.artifact} acted on no token, because ${why}.`, tone: "off" };
    }
    const kl = mean((receipt.effects?.choices ?? []).map((choice) => choice.interventions[j]?.shift.kl.mean));
    const card = receipt.effects?.choices[0]?.interventions[j]?.card_kl;
    const effect = kl === undefined ? "" : `, which moved the ${(receipt.effects?.choices.length ?? 1) > 1 ? "answers" : "answer"} by ${nats(kl)} a token`;
    const expected = card === undefined || card === null ? "" : ` (its card says ${nats(card)})`;
    const floor = kl === undefined || floors[one.artifact] === undefined ? "" : `; a random one of that size: ${nats(floors[one.artifact] ?? 0)}`;
    return {
      text: `${one.artifact} ${DONE[one.op] ?? one.op} ${where} ${one.op === "add" ? "to" : "on"} ${tokens} tokens${effect}${expected}${floor}.`,
      tone: "done",
    };
  });
  if (found.length === 0) {
    found.push({ text: "Nothing was applied.", tone: "off" });
  }
  receipt.applied.forEach((one) => found.push(...held(one)));
  const text = receipt.effects?.choices[0]?.text;
  if (text !== undefined && text.repetition > 0.3) {
    found.push({ text: `The text repeats itself: ${short(100 * text.repetition)} % of its three-token sequences occurred before.`, tone: "warn" });
  }
  for (const warning of receipt.warnings ?? []) {
    found.push({ text: warning.message, tone: "warn" });
  }
  if (receipt.effects?.status === "failed") {
    found.push({ text: `The effect was not measured: ${receipt.effects.reason ?? "it failed"}.`, tone: "warn" });
  }
  return found;
}

function mean(values: readonly (number | undefined)[]): number | undefined {
  const known = values.filter((one): one is number => one !== undefined);
  return known.length === 0 ? undefined : known.reduce((sum, one) => sum + one, 0) / known.length;
}

/** What gates and guards did to an intervention. */
function held(one: Receipt["applied"][number]): Sentence[] {
  const found: Sentence[] = [];
  for (const choice of one.choices) {
    const scores = (choice.gate?.scores ?? []).flatMap((layers) => Object.values(layers)).map((score) => short(score));
    if (choice.gate) {
      const read = scores.length === 0 ? "" : `, reading ${scores.join(", ")}`;
      found.push({ text: `The gate of ${one.artifact} ${choice.gate.open ? "opened" : "stayed shut"}${read}.`, tone: choice.gate.open ? "done" : "off" });
    }
    for (const event of choice.guard) {
      const why = event.reason === "unmeasured" ? "it could not be measured" : event.reason === "kl" ? `it moved the text by ${nats(event.kl ?? 0)} a token` : `the text repeated itself (${short(100 * event.repetition)} %)`;
      found.push({ text: `From token ${event.token + 1} on the guard ${event.factor === 0 ? `stopped ${one.artifact}` : `left ${short(100 * event.factor)} % of ${one.artifact}`}, because ${why}.`, tone: "warn" });
    }
  }
  return found;
}
