import { describe, expect, it } from "vitest";

import lines from "../../../lab/data/harmful_harmless.jsonl?raw";
import { fieldsOf, given, keyOf, titleOf, usual, type Schema, type Typed } from "../src/lib/forms.js";
import { doses, graderOf } from "../src/lib/graders.js";
import { culpritOf, strengthOf } from "../src/lib/heat.js";
import { example, kindsOf, offerOf, sentence } from "../src/lib/methods.js";
import { outcomesOf, overTime, type Outcome } from "../src/lib/outcomes.js";
import { readRows } from "../src/lib/rows.js";
import { fullest, met, scoreRows } from "../src/lib/scores.js";
import { Unreadable } from "../src/lib/spec.js";
import { touchedByDefault, touchedByKill } from "../src/lib/touched.js";

/** As the server tells them, cut to what matters. */
const condition = {
  name: "condition",
  summary: "probe and threshold that tell prompts of a kind from others",
  data: "examples",
  request: {
    required: ["name", "examples", "target"],
    properties: {
      name: { type: "string" },
      layers: { anyOf: [{ const: "all", type: "string" }, { items: { type: "integer" }, type: "array" }, { $ref: "#/$defs/Range" }], default: "all" },
      draws: { anyOf: [{ type: "integer" }, { type: "null" }], default: 20 },
      examples: { type: "array", items: { $ref: "#/$defs/Example" } },
      target: { type: "string", description: "The label of the kind." },
      pool: { anyOf: [{ enum: ["mean", "last"], type: "string" }, { type: "null" }], default: "mean" },
      tags: { anyOf: [{ items: { type: "string" }, type: "array" }, { type: "null" }], default: [] },
      strengths: { anyOf: [{ items: { type: "number" }, type: "array" }, { type: "null" }], default: [0.1, 0.2] },
      exact: { anyOf: [{ type: "boolean" }, { type: "null" }], default: false },
      readout: { $ref: "#/$defs/Readout", description: "Answers." },
      grader: { anyOf: [{ oneOf: [{ $ref: "#/$defs/Whole" }, { $ref: "#/$defs/Readout" }] }, { type: "null" }], default: null },
    },
    $defs: {
      Range: { type: "object", properties: { start: { type: "integer" } } },
      Example: {
        type: "object",
        required: ["text", "label"],
        properties: {
          text: { anyOf: [{ type: "string" }, { type: "array", items: {} }] },
          label: { type: "string" },
          item: { anyOf: [{ type: "string" }, { type: "null" }] },
          step: { anyOf: [{ type: "integer" }, { type: "null" }] },
        },
      },
      Readout: { type: "object", required: ["target"], properties: { target: { type: "array", items: { type: "string" } }, others: { type: "array", items: { type: "string" } } } },
      Whole: { type: "object", properties: { kind: { const: "whole" } } },
    },
  } satisfies Schema,
};

describe("a form from a schema", () => {
  const fields = fieldsOf(condition.request, ["name", "examples"]);
  const kinds = Object.fromEntries(fields.map((one) => [keyOf(one), one.kind]));

  it("has a control for every field, those of an object one by one", () => {
    expect(kinds).toEqual({ layers: "layers", draws: "number", target: "text", pool: "choice", tags: "words", strengths: "numbers", exact: "yes", "readout.target": "words", "readout.others": "words", grader: "json" });
    expect(fields.filter((one) => one.required).map(keyOf)).toEqual(["target"]);
    expect(fields.map((one) => titleOf(one)).slice(-3)).toEqual(["Readout target", "Readout others", "Grader"]);
    expect(usual(fields.find((one) => keyOf(one) === "strengths")!)).toBe("0.1, 0.2");
  });

  it("sends what was typed and nothing else", () => {
    expect(given(fields, { target: "harmful", layers: "2-4", draws: "40", tags: "a, b", strengths: "1 2", exact: "no", "readout.target": " yes\n no", grader: '{"kind": "whole"}' })).toEqual({
      target: "harmful", layers: [2, 3, 4], draws: 40, tags: ["a", "b"], strengths: [1, 2], exact: false, readout: { target: ["yes", "no"] }, grader: { kind: "whole" },
    });
  });

  it("names what cannot be sent", () => {
    const wrong: Typed[] = [{}, { target: "x", draws: "many" }, { target: "x", grader: "{" }, { target: "x", strengths: "1 two" }];
    for (const typed of wrong) {
      expect(() => given(fields, typed)).toThrow(Unreadable);
    }
  });

  it("begins words that follow other text with their space where they are read one a line", () => {
    const offer = offerOf({ name: "sign_pattern", summary: "dims", data: "anchors", request: { properties: { anchors: { type: "array", items: { type: "string" } } } } });
    expect(offer.kind).toBe("lines");
    expect(readRows(" Monday\n Tuesday\n\n", offer.form).rows).toEqual([" Monday", " Tuesday"]);
    expect(readRows('[" Monday", 3]', offer.form)).toMatchObject({ rows: [" Monday"], errors: ["Entry 2 is no text."] });
    expect(readRows('"a"\n{"text": "b"}', offer.form).rows).toEqual(["a", "b"]);
  });
});

describe("what a method takes", () => {
  const offer = offerOf(condition);

  it("is told from its schema", () => {
    expect(offer.kind).toBe("text,label");
    expect(kindsOf([offer]).map((one) => one.title)).toEqual(["Texts with labels"]);
    expect(example(offer.form)).toBe('text,label\n"How do I bake a cake?",harmless');
    expect(sentence(offer.summary)).toBe("Probe and threshold that tell prompts of a kind from others.");
  });

  it("is read with its problems named", () => {
    const found = readRows("text,label,step\nhello,one,1\nthere,one,two\n,one,3\nyou,,1", offer.form);
    expect(found.rows).toEqual([{ text: "hello", label: "one", step: 1 }]);
    expect(found.errors).toEqual(["Row 3 has “two” as “step”, which is no number.", "Row 4 lacks “text”.", "Row 5 lacks “label”."]);
    expect(found.warnings.join(" ")).toMatch(/same label/);
  });

  it("of every method that the bundled data sets are for can be pasted as they are", () => {
    const found = readRows(lines, offer.form);
    expect(found.errors).toEqual([]);
    expect(found.rows.length).toBe(lines.trim().split("\n").length);
  });
});

describe("a grader", () => {
  it("is sent as the server takes it", () => {
    expect(graderOf("refusal", "refusal")).toEqual({ kind: "refusal", wanted: "refusal" });
    expect(graderOf("length", "40")).toEqual({ kind: "length", most: 40 });
    expect(graderOf("whole", "")).toEqual({ kind: "whole" });
    expect(graderOf("JSON", '{"kind": "choice"}')).toEqual({ kind: "choice" });
    for (const [kind, value] of [["language", " "], ["JSON", "{"], ["length", "few"]] as const) {
      expect(() => graderOf(kind, value)).toThrow(Unreadable);
    }
  });

  it("is asked at doses other than 0", () => {
    expect(doses("1, 2 -0.5, 1")).toEqual([1, 2, -0.5]);
    expect(() => doses("0")).toThrow(Unreadable);
    expect(() => doses(" ")).toThrow(Unreadable);
  });
});

describe("the colour of a token", () => {
  const per = { kl: [0.5, 0.001, 3], surprise: [1, 2.5, 50], rank: [0, 9, 5000], interventions: [[0.1, 0, 2], [0.4, 0, -3]] } as never;

  it("shows the figure that was chosen", () => {
    expect([0, 1, 2].map((i) => strengthOf(per, i, "kl"))).toEqual([0.5, 0.001, 1]);
    expect([0, 1, 2].map((i) => strengthOf(per, i, "surprise"))).toEqual([0.2, 0.5, 1]);
    expect([0, 2].map((i) => strengthOf(per, i, "rank"))).toEqual([0, 1]);
    expect(strengthOf(per, 1, "rank")).toBeCloseTo(0.5, 1);
    expect([0, 1, 2].map((i) => strengthOf(per, i, "which"))).toEqual([1, 0, 1]);
    expect(strengthOf(null, 0, "kl")).toBe(0);
  });

  it("is that of the intervention that moved it most, where that is shown", () => {
    expect([0, 2].map((i) => culpritOf(per, i, "which"))).toEqual([1, 1]);
    expect(culpritOf(per, 0, "surprise")).toBe(0);
  });
});

describe("graded answers", () => {
  const rows: Outcome[] = [
    { minute: 10, grader: "refusal", answers: 1, shares: { broken: 1 } },
    { minute: 11, grader: "refusal", answers: 3, shares: { answered: 1 } },
    { minute: 20, grader: "refusal", answers: 2, shares: { answered: 0.5, refused: 0.5 } },
  ];

  it("are shown with broken ones last, and weighed over time", () => {
    const names = outcomesOf(rows);
    expect(names).toEqual(["answered", "refused", "broken"]);
    expect(overTime(rows, names, 5)).toEqual({
      x: [600, 1200],
      lines: [
        { name: "answered", values: [0.75, 0.5] },
        { name: "refused", values: [0, 0.5] },
        { name: "broken", values: [0.25, 0] },
      ],
    });
  });
});

describe("what a probe reads", () => {
  const report = { probe: "p@1", site: "resid_post", layers: [1, 3], form: "linear", threshold: 2, direction: "above", status: "read", reason: null, choices: [{ index: 0, prompt: { 1: [9, 1, 3], 3: [0, 5] }, generation: {} }] } as const;

  it("has the last layer first, and a scale that the first token does not spoil", () => {
    expect(scoreRows(report as never).map((row) => row.layer)).toEqual([3, 1]);
    expect(fullest([900, 1, 5], null)).toBe(5);
    expect(fullest([900, 1, 5], 2)).toBe(3);
    expect(fullest([7], null)).toBe(7);
    expect([met(3, 2, "above"), met(3, 2, "below"), met(3, null, "above")]).toEqual([true, false, null]);
  });
});

describe("what a switch touches", () => {
  const counts = { requests: { "2xx": 10, "4xx": 2 }, steered: 8, uses: { a: 1, b: 5, c: 2, d: 3, e: 4 } } as never;

  it("is told from the last hour", () => {
    expect(touchedByKill(counts, 2)).toEqual(["In the last hour 8 of 12 requests were steered, with b (5 times), e (4 times), d (3 times), c (2 times), and 1 more.", "2 completions run now; the steered ones go on unsteered from their next token."]);
    expect(touchedByDefault(counts)).toEqual(["In the last hour 12 requests came: 4 without steering, which would be steered then, and 8 steered, on which it would act first."]);
    const none = { requests: {}, steered: 0, uses: {} } as never;
    expect([...touchedByKill(none, 0), ...touchedByDefault(none)]).toEqual(["Nothing was asked in the last hour.", "No completion runs now.", "Nothing was asked in the last hour."]);
  });
});
