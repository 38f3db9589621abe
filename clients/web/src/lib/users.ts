/** What depends on an artifact. */

import type { Preset, Spec } from "@trimtab/client";

import { nameOf } from "./changes.js";
import { server } from "./server.svelte.js";

const PAGE = 200;

/** Presets whose spec names the artifact, by any version or alias, and whether the server's default spec does. */
export async function users(name: string): Promise<{ presets: Preset[]; standard: boolean }> {
  const presets: Preset[] = [];
  let cursor: string | null = null;
  do {
    const page: Awaited<ReturnType<typeof server.client.listPresets>> = await server.client.listPresets({ limit: PAGE, ...(cursor === null ? {} : { cursor }) });
    presets.push(...page.data.filter((preset) => names(preset.spec as Spec, name)));
    cursor = page.cursor ?? null;
  } while (cursor !== null);
  // Only those who may change the default steering may read it.
  const standard = server.may("operate") ? (await server.client.defaultSpec()).spec : null;
  return { presets, standard: standard !== null && names(standard as Spec, name) };
}

/** Whether a spec applies an artifact, or reads it as a gate. */
export function names(spec: Spec, name: string): boolean {
  return (spec.interventions ?? []).some((one) => {
    const gate = one.gate as { probe?: string; all?: { probe: string }[]; any?: { probe: string }[] } | null | undefined;
    const probes = [gate?.probe, ...(gate?.all ?? gate?.any ?? []).map((other) => other.probe)];
    return [one.artifact, ...probes].some((ref) => ref != null && nameOf(ref) === name);
  });
}
