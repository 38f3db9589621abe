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

export function sentences(receipt: Receipt): Sentence[] {
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
    const kl = receipt.effects?.choices[0]?.interventions[j]?.shift.kl.mean;
    const card = receipt.effects?.choices[0]?.interventions[j]?.card_kl;
    const effect = kl === undefined ? "" : `, which moved the answer by ${nats(kl)} a token`;
    const expected = card === undefined || card === null ? "" : ` (its card says ${nats(card)})`;
    return {
      text: `${one.artifact} ${DONE[one.op] ?? one.op} ${where} ${one.op === "add" ? "to" : "on"} ${tokens} tokens${effect}${expected}.`,
      tone: "done",
    };
  });
  if (found.length === 0) {
    found.push({ text: "Nothing was applied.", tone: "off" });
  }
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
