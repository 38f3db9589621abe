/** What a calibration says about a strength: the dose it gives, where text stays whole, what random vectors do. */

import type { Calibration } from "@trimtab/client";

type Setting = Calibration["settings"][number];

/** Text counts as whole up to twice the untouched perplexity and a tenth more repetition. */
const PERPLEXITY = 2;
const REPETITION = 0.1;

export interface Dosing {
  setting: Setting;
  /** Largest doses that were measured, in nats; `least` is negative, 0 where the other sign was not measured. */
  least: number;
  most: number;
  /** Doses at which text stayed whole. */
  whole: { least: number; most: number };
}

/** The curve of an artifact for the served model, if one was measured. */
export function dosing(calibration: Calibration | null, fingerprint: string): Dosing | null {
  const setting = calibration?.settings.find((one) => one.fingerprint === fingerprint);
  if (setting === undefined) {
    return null;
  }
  const whole = (side: Setting["up"]) =>
    Math.max(
      0,
      ...side
        .filter(
          (one) =>
            one.perplexity <= PERPLEXITY * setting.base.perplexity &&
            one.repetition <= setting.base.repetition + REPETITION,
        )
        .map((one) => one.kl),
    );
  const largest = (side: Setting["up"]) => Math.max(0, ...side.map((one) => one.kl));
  const negative = (value: number) => (value === 0 ? 0 : -value);
  return {
    setting,
    least: negative(largest(setting.down)),
    most: largest(setting.up),
    whole: { least: negative(whole(setting.down)), most: whole(setting.up) },
  };
}

/** Of the curve's side that `kl` is on, the strength that gives it: linear between what was measured. */
export function strengthAt(found: Dosing, kl: number): number {
  const side = [{ kl: 0, strength: 0 }, ...(kl < 0 ? found.setting.down : found.setting.up)]
    .map((one) => ({ kl: one.kl, strength: Math.abs(one.strength) }))
    .sort((a, b) => a.strength - b.strength);
  return between(side.map((one) => one.kl), side.map((one) => one.strength), Math.abs(kl));
}

/** What random vectors of the same size do, in nats. */
export function floorAt(found: Dosing, kl: number): number | null {
  return found.setting.floor.length === 0 ? null : floorAtStrength(found, strengthAt(found, kl));
}

function floorAtStrength(found: Dosing, strength: number): number {
  const floor = [...found.setting.floor].sort((a, b) => a.strength - b.strength);
  return between(
    [0, ...floor.map((one) => Math.abs(one.strength))],
    [0, ...floor.map((one) => one.kl.median)],
    strength,
  );
}

/** What random artifacts of the strength that a receipt tells do, in nats a token; null where nobody measured it. */
export function floorOf(calibration: Calibration | null, fingerprint: string, strength: Record<string, unknown>): number | null {
  const found = dosing(calibration, fingerprint);
  const scale = Object.values((strength.scale as Record<string, number> | undefined) ?? {})[0];
  if (found === null || found.setting.floor.length === 0 || scale === undefined) {
    return null;
  }
  return floorAtStrength(found, Math.abs(scale));
}

/** Linear interpolation; beyond the ends the last value. `x` must not fall. */
function between(x: readonly number[], y: readonly number[], at: number): number {
  for (let i = 1; i < x.length; i += 1) {
    const [x0, x1, y0, y1] = [x[i - 1] ?? 0, x[i] ?? 0, y[i - 1] ?? 0, y[i] ?? 0];
    if (at <= x1) {
      return x1 === x0 ? y1 : y0 + ((y1 - y0) * (at - x0)) / (x1 - x0);
    }
  }
  return y.at(-1) ?? 0;
}

/** Place of a dose on a slider from -1 to 1: small doses get more room, as there the most changes. */
export function place(found: Dosing, kl: number): number {
  const end = kl < 0 ? Math.abs(found.least) : found.most;
  return end === 0 ? 0 : Math.sign(kl) * Math.sqrt(Math.min(Math.abs(kl) / end, 1));
}

export function doseAt(found: Dosing, position: number): number {
  const end = position < 0 ? Math.abs(found.least) : found.most;
  return Math.sign(position) * position * position * end;
}
