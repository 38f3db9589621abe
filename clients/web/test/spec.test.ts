import { describe, expect, it } from "vitest";

import { program } from "../src/lib/code.js";
import { bodyOf, FIRST, intervention, newItem, packed, parseLayers, pathOf, specOf, steeringOf, Unreadable, unpacked, type Column, type Table } from "../src/lib/spec.js";

describe("layers as people type them", () => {
  it("reads single layers, lists and ranges", () => {
    expect(parseLayers("")).toBeNull();
    expect(parseLayers(" 3, 5-7 , -1")).toEqual([3, 5, 6, 7, -1]);
    expect(parseLayers("2 to 4")).toEqual([2, 3, 4]);
  });

  it("says what it cannot read", () => {
    for (const text of ["all", "5-2", "1;2", "0-9999999"]) {
      expect(() => parseLayers(text)).toThrow(Unreadable);
    }
  });
});

describe("an intervention", () => {
  it("leaves out what was not chosen, so that the card decides", () => {
    expect(intervention(newItem("calm"))).toEqual({ artifact: "calm" });
  });

  it("carries a dose, layers, scope and further fields", () => {
    const item = { ...newItem("calm"), strength: { kind: "dose", kl: 0.5 } as const, layers: "2, 3", prompt: "user", generation: "none", extra: '{"gate": {"probe": "p"}}' } as const;
    expect(intervention(item)).toEqual({
      artifact: "calm",
      strength: { kl: 0.5 },
      layers: [2, 3],
      scope: { prompt: { roles: ["user"] }, generation: "none" },
      gate: { probe: "p" },
    });
  });

  it("acts on what was painted, in as few words as it takes", () => {
    const painted = (positions: number[]) => intervention({ ...newItem("calm"), prompt: "painted", painted: positions }).scope;
    expect(painted([2, 9, 4])).toEqual({ prompt: { positions: [2, 4, 9] } });
    expect(painted([5, 3, 4, 9])).toEqual({ prompt: { windows: [[3, 6], [9, 10]] } });
    expect(painted([])).toEqual({ prompt: "none" });
  });

  it("acts in sections of the answer", () => {
    expect(intervention({ ...newItem("calm"), generation: "sections", sections: ["reasoning", "json"] }).scope).toEqual({ generation: { sections: ["reasoning", "json"] } });
    expect(() => intervention({ ...newItem("calm"), generation: "sections" })).toThrow(Unreadable);
  });

  it("has a gate, whose card says what is left open, and options", () => {
    const gate = { probe: "harmful", threshold: "", direction: "", when: "prompt" } as const;
    expect(intervention({ ...newItem("calm"), gate, options: '{"norm_match": true}' })).toEqual({ artifact: "calm", gate: { probe: "harmful" }, options: { norm_match: true } });
    expect(intervention({ ...newItem("calm"), gate: { ...gate, threshold: "-0.5", direction: "below", when: "token" } }).gate).toEqual({ probe: "harmful", threshold: -0.5, direction: "below", when: "token" });
    expect(() => intervention({ ...newItem("calm"), gate: { ...gate, threshold: "high" } })).toThrow(Unreadable);
    expect(() => intervention({ ...newItem("calm"), gate: { ...gate, probe: " " } })).toThrow(Unreadable);
  });

  it("refuses further fields that are no object", () => {
    expect(() => intervention({ ...newItem("calm"), extra: "[1]" })).toThrow(Unreadable);
    expect(() => intervention({ ...newItem("calm"), extra: "{" })).toThrow(Unreadable);
  });
});

describe("a column", () => {
  it("that holds nothing, or only what is switched off, steers nothing", () => {
    expect(steeringOf({ preset: "", items: [] })).toBeNull();
    expect(steeringOf({ preset: "", items: [{ ...newItem("calm"), off: true }] })).toBeNull();
    expect(steeringOf({ preset: "warm", items: [] })).toEqual({ preset: "warm" });
  });
});

describe("a guard", () => {
  it("is a part of what is asked and of what is saved", () => {
    const column: Column = { preset: "", items: [newItem("calm")], guard: { max_kl: 1, max_repetition: null, action: "stop" } };
    expect(steeringOf(column)?.guard).toEqual({ max_kl: 1, action: "stop" });
    expect(specOf(column)).toEqual({ interventions: [{ artifact: "calm" }], guard: { max_kl: 1, action: "stop" } });
    expect(() => steeringOf({ ...column, guard: { max_kl: null, max_repetition: null, action: "lower" } })).toThrow(Unreadable);
  });
});

describe("a fork", () => {
  it("has prompt and answer up to a token as its prompt, whatever the kind of prompt", () => {
    const ask = { ...FIRST.ask, prompt: "Hi", fork: { ids: [1, 2, 3], text: "Yes" } };
    expect(bodyOf(ask, "m", null)).toMatchObject({ prompt: [1, 2, 3] });
    expect(bodyOf(ask, "m", null)).not.toHaveProperty("messages");
    expect(pathOf(ask)).toBe("/v1/completions");
    expect(pathOf({ ...ask, fork: null })).toBe("/v1/chat/completions");
  });
});

describe("the address of the page", () => {
  const columns: Column[] = [{ preset: "", guard: null, items: [{ ...newItem("grüße"), strength: { kind: "value", value: -2, unit: "raw" } }] }];

  it("holds the whole state, any script included", () => {
    const table = { ask: { ...FIRST.ask, prompt: "Ça va? 🌍 \"' </script>", turns: [{ role: "assistant", content: "Ja" }] }, columns, view: "heat", by: "rank" } satisfies Table;
    expect(packed(table)).toMatch(/^[\w-]+$/);
    expect(unpacked(packed(table))).toEqual(table);
  });

  it("of nonsense is no table", () => {
    expect(unpacked("%%%")).toBeNull();
    expect(unpacked(btoa("[1"))).toBeNull();
  });
});

describe("the copied call", () => {
  const ask = { ...FIRST.ask, prompt: "It's \"so\"" };

  it("as curl survives a shell", () => {
    const text = program("curl", "http://x", "/v1/chat/completions", bodyOf(ask, "m", null), true);
    expect(text).toContain("It'\\''s \\\"so\\\"");
    expect(text).toContain("$TRIMTAB_API_KEY");
  });

  it("as Python has Python's constants", () => {
    const body = { model: "m", messages: [{ role: "user", content: "x", name: null }], stream: true };
    expect(program("Python", "http://x", "/v1/chat/completions", body, false)).toContain('"name": None}], model="m", stream=True)');
  });
});
