/** What can be drawn of an artifact's card and report. */

import type { Artifact } from "@trimtab/client";

/** Scores by layer, if the report that the artifact was made with has them. */
export function layerScores(artifact: Artifact): { title: string; rows: { label: string; value: number }[] } | null {
  const report = artifact.provenance.report as Record<string, unknown> | undefined;
  const layers = Object.entries((report?.layers as Record<string, { dev?: { auc?: number } }> | undefined) ?? {}).map(
    ([label, one]) => ({ label, value: one?.dev?.auc }),
  );
  if (layers.length > 1 && layers.every((row) => typeof row.value === "number")) {
    return { title: "AUC on held-out prompts by layer", rows: layers as { label: string; value: number }[] };
  }
  const NAMES: [string, string][] = [
    ["dev_auc", "AUC on held-out prompts by layer"],
    ["auc", "AUC by layer"],
    ["dev", "Score on held-out prompts by layer"],
    ["scores", "Score by layer"],
  ];
  for (const [name, title] of NAMES) {
    const found = numbersByLayer(report?.[name]);
    if (found !== null) {
      return { title, rows: found };
    }
  }
  return null;
}

function numbersByLayer(value: unknown): { label: string; value: number }[] | null {
  if (typeof value !== "object" || value === null) {
    return null;
  }
  const rows = Object.entries(value)
    .filter(([label]) => /^\d+$/.test(label))
    .map(([label, one]) => ({ label, value: scalar(one) }));
  return rows.length > 1 && rows.every((row) => row.value !== null) ? (rows as { label: string; value: number }[]) : null;
}

/** A number, or the largest of a map of numbers: a layer tried at several strengths counts at its best. */
function scalar(value: unknown): number | null {
  if (typeof value === "number") {
    return value;
  }
  if (typeof value === "object" && value !== null) {
    const numbers = Object.values(value).filter((one): one is number => typeof one === "number");
    return numbers.length > 0 ? Math.max(...numbers) : null;
  }
  return null;
}
