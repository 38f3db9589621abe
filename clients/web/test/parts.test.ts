import { describe, expect, it } from "vitest";

import { doseAt, dosing, floorAt, place, strengthAt } from "../src/lib/dose.js";
import { bytes, nats, percent, runs } from "../src/lib/format.js";
import { changes } from "../src/lib/changes.js";
import { likeliest } from "../src/lib/likeliest.js";
import { readRows, type DataForm } from "../src/lib/rows.js";
import { pointsOf } from "../src/lib/points.js";
import { header } from "../src/lib/tensorfile.js";
import { sentences } from "../src/lib/words.js";

const outcome = (strength: number, kl: number, perplexity: number) => ({ strength, kl, perplexity, repetition: 0.02, kl_error: 0, compression: 1, length: 20, ended: 0.1, target: null });
const calibration = {
  version: 1,
  settings: [
    {
      fingerprint: "f",
      base: outcome(0, 0, 3),
      up: [outcome(1, 0.1, 3.1), outcome(2, 0.4, 5), outcome(4, 2, 40)],
      down: [outcome(1, 0.2, 3.2)],
      floor: [{ strength: 2, kl: { low: 0, median: 0.02, high: 0.1 }, perplexity: { low: 3, median: 3, high: 3 }, repetition: { low: 0, median: 0, high: 0 }, target: null }],
    },
  ],
} as never;

describe("a calibration", () => {
  const found = dosing(calibration, "f");

  it("of another model says nothing", () => {
    expect(dosing(calibration, "other")).toBeNull();
    expect(dosing(null, "f")).toBeNull();
  });

  it("tells how far doses go and where text stays whole", () => {
    expect([found?.least, found?.most]).toEqual([-0.2, 2]);
    // Perplexity 40 is over twice the untouched 3, 5 is not.
    expect(found?.whole).toEqual({ least: -0.2, most: 0.4 });
  });

  it("finds the strength of a dose between measured ones", () => {
    expect(strengthAt(found!, 0.25)).toBeCloseTo(1.5);
    expect(strengthAt(found!, -0.1)).toBeCloseTo(0.5);
    expect(floorAt(found!, 0.1)).toBeCloseTo(0.01);
  });

  it("places doses on a slider and reads them back", () => {
    for (const kl of [-0.2, -0.05, 0, 0.4, 2]) {
      expect(doseAt(found!, place(found!, kl))).toBeCloseTo(kl);
    }
  });
});

describe("numbers for people", () => {
  it("are short", () => {
    expect([nats(0.0002), nats(0.0123), nats(1.234), percent(0.031), percent(0.5), bytes(1_234_000)]).toEqual(["under 0.001 nats", "0.012 nats", "1.23 nats", "3.1 %", "50 %", "1.23 MB"]);
    expect(runs([0, 1, 2, 5, 7, 8])).toBe("0-2, 5, 7, 8");
  });
});

describe("versions that took the place of others", () => {
  const row = (artifact: string, kl_mean: number, first: number) => ({ artifact, op: "add", kl_mean, first, last: first, completions: 1, tokens: 1, kl_p95: 0, entropy_change: 0, top1_changed: 0, repetition: 0 });

  it("are named with how much stronger they act, the largest move first", () => {
    const found = changes([row("calm@1", 0.2, 60), row("calm@2", 0.22, 120), row("loud@10", 0.9, 60), row("loud@9", 0.3, 60), row("alone@1", 1, 0), row("inline", 1, 0)]);
    expect(found.map((one) => [one.before.artifact, one.after.artifact])).toEqual([["loud@9", "loud@10"], ["calm@1", "calm@2"]]);
    expect(found[0]?.ratio).toBeCloseTo(3);
  });

  it("are the last two of several", () => {
    const found = changes([row("calm@1", 0.1, 0), row("calm@3", 0.4, 180), row("calm@2", 0.2, 60)]);
    expect(found.map((one) => [one.before.artifact, one.after.artifact])).toEqual([["calm@2", "calm@3"]]);
  });

  it("rolled back, the one that acts now is the later one", () => {
    expect(changes([row("calm@2", 0.4, 60), row("calm@1", 0.1, 120)])[0]?.after.artifact).toBe("calm@1");
  });
});

describe("what was counted", () => {
  const timing = { count: 0, mean: null, p50: null, p95: null };
  const counts = (more: object) => ({ requests: {}, generated_tokens: 0, running: 0, waiting: 0, queued: 0, queue: timing, first_token: timing, between_tokens: timing, ...more });

  it("is rates by the width of a bucket, and by the time between events where they are known", () => {
    const history = { bucket_s: 60, data: [counts({ start: 0, requests: { "2xx": 30, "4xx": 30 }, generated_tokens: 600 }), counts({ start: 60, generated_tokens: 999 })] };
    const recent = [counts({ at: 90 }), counts({ at: 95, generated_tokens: 50 })];
    const points = pointsOf(history as never, recent as never, 600);
    expect(points.map((one) => [one.time, one.requests, one.rate])).toEqual([[30, 1, 10], [95, 0, 10]]);
  });

  it("over days is the stored buckets alone", () => {
    const history = { bucket_s: 360, data: [counts({ start: 0, generated_tokens: 36 })] };
    expect(pointsOf(history as never, [counts({ at: 1 }), counts({ at: 2 })] as never, 86400).map((one) => one.rate)).toEqual([0.1]);
    expect(pointsOf(null, [], 600)).toEqual([]);
  });
});

describe("alternatives of the untouched model", () => {
  it("are the likeliest in order, without the token that only stands there because it was said", () => {
    const place = { 7: { logprob: -9, rank: 80, decoded_token: "said" }, 3: { logprob: -2, rank: 2, decoded_token: "b" }, 1: { logprob: -0.1, rank: 1, decoded_token: "a" } };
    expect(likeliest(place)).toEqual([{ text: "a", logprob: -0.1 }, { text: "b", logprob: -2 }]);
    expect(likeliest(null)).toEqual([]);
  });
});

const PAIRS: DataForm = {
  columns: [
    { name: "positive", required: true, description: "", kind: "prompt", choices: [] },
    { name: "negative", required: true, description: "", kind: "prompt", choices: [] },
    { name: "item", required: false, description: "", kind: "text", choices: [] },
    { name: "split", required: false, description: "", kind: "text", choices: ["train", "dev", "test"] },
  ],
};

describe("pasted pairs", () => {
  it("are read from JSON lines, a list, a table with and without names", () => {
    const pair = { positive: "Yes, gladly", negative: "No" };
    const rows = (text: string) => readRows(text, PAIRS).rows;
    expect(rows(JSON.stringify(pair))).toEqual([pair]);
    expect(rows(JSON.stringify([pair]))).toEqual([pair]);
    expect(rows('negative,positive\nNo,"Yes, gladly"\n')).toEqual([pair]);
    expect(rows("Yes, gladly\tNo\titem1")).toEqual([{ ...pair, item: "item1" }]);
    expect(rows(JSON.stringify({ ...pair, split: "test", other: 1 }))).toEqual([{ ...pair, split: "test" }]);
    expect(rows('"a ""quoted""\nline",b')).toEqual([{ positive: 'a "quoted"\nline', negative: "b" }]);
    const chat = { positive: [{ role: "user", content: "Hi" }], negative: "No" };
    expect(rows(JSON.stringify(chat))).toEqual([chat]);
  });

  it("that are wrong are named, the rest is kept", () => {
    const found = readRows('{"positive": "a", "negative": "b"}\nnonsense\n{"positive": "a"}\n{"positive": "a", "negative": " "}\n{"positive": 1, "negative": "b"}\n{"positive": "a", "negative": "b", "split": "all"}', PAIRS);
    expect(found.rows).toHaveLength(1);
    expect(found.errors).toEqual([
      "Line 2 is not JSON.",
      "Line 3 lacks “negative”.",
      "Line 4 has an empty “negative”.",
      "Line 5 has a “positive” that is no text.",
      "Line 6 has “all” as “split”, which must be train, dev, test.",
    ]);
  });

  it("that may spoil the result are warned about", () => {
    const warnings = readRows("same,same\nlong long long long,x\nlong long long long,x", PAIRS).warnings.join(" ");
    expect(warnings).toMatch(/no contrast/);
    expect(warnings).toMatch(/twice/);
    expect(warnings).toMatch(/few/);
    expect(warnings).toMatch(/about length/);
    expect(readRows("", PAIRS).warnings).toEqual([]);
    expect(readRows('{"positive": "a", "negative": "b", "split": "dev"}\n{"positive": "c", "negative": "d"}', PAIRS).warnings.join(" ")).toMatch(/1 of 2 rows name a split/);
  });
});

describe("a file of tensors", () => {
  it("tells what is in it before it is sent", async () => {
    const json = new TextEncoder().encode('{"__metadata__":{"model_id":"m"},"layer.2":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}');
    const start = new Uint8Array(8);
    new DataView(start.buffer).setBigUint64(0, BigInt(json.length), true);
    expect(await header(new Blob([start, json, new Uint8Array(16)]))).toEqual({ format: "safetensors", model: "m", described: false, tensors: [{ name: "layer.2", dtype: "F32", shape: [4] }] });
  });

  it("that is none is refused", async () => {
    for (const content of ["x", "GGUF", "0123456789 no tensors here", "\u0002\u0000\u0000\u0000\u0000\u0000\u0000\u0000{x"]) {
      await expect(header(new Blob([content]))).rejects.toThrow(/file/i);
    }
  });
});

describe("a receipt in words", () => {
  const applied = { artifact: "calm@3", op: "add", layers: [14], sites: ["resid_post"], tokens: { prompt: 20, generation: 11 }, choices: [], source: "request", strength: {}, options: {}, gate: null };

  it("says what acted where, on how much, and what it did", () => {
    const effects = { status: "measured", choices: [{ interventions: [{ shift: { kl: { mean: 0.42 } }, card_kl: 0.4 }], text: { repetition: 0 } }] };
    expect(sentences({ applied: [applied], disabled: false, engine: "transformers", effects } as never)).toEqual([
      { text: "calm@3 added at layer 14 to 31 tokens, which moved the answer by 0.42 nats a token (its card says 0.40 nats).", tone: "done" },
    ]);
  });

  it("says what a random artifact of that size does", () => {
    const effects = { status: "measured", choices: [{ interventions: [{ shift: { kl: { mean: 0.42 } }, card_kl: null }], text: { repetition: 0 } }] };
    expect(sentences({ applied: [applied], disabled: false, effects } as never, { "calm@3": 0.05 })[0]?.text).toBe(
      "calm@3 added at layer 14 to 31 tokens, which moved the answer by 0.42 nats a token; a random one of that size: 0.050 nats.",
    );
  });

  it("says what gates and guards did", () => {
    const choices = [{ gate: { open: false, scores: [{ 3: -0.5 }] }, guard: [{ token: 15, factor: 0.5, reason: "kl", kl: 1.2, repetition: 0 }, { token: 31, factor: 0, reason: "repetition", kl: null, repetition: 0.6 }] }];
    const said = sentences({ applied: [{ ...applied, choices }], disabled: false } as never).map((one) => one.text);
    expect(said.slice(1)).toEqual([
      "The gate of calm@3 stayed shut, reading -0.5.",
      "From token 16 on the guard left 50 % of calm@3, because it moved the text by 1.20 nats a token.",
      "From token 32 on the guard stopped calm@3, because the text repeated itself (60 %).",
    ]);
  });

  it("says why nothing acted", () => {
    expect(sentences({ applied: [], disabled: true, reason: "the kill switch is on" } as never)[0]?.text).toBe("Nothing was applied, because the kill switch is on.");
    const shut = { ...applied, tokens: { prompt: 0, generation: 0 }, gate: {} };
    expect(sentences({ applied: [shut], disabled: false } as never)[0]?.text).toMatch(/gate stayed shut/);
  });
});
