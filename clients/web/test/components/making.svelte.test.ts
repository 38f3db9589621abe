// @vitest-environment jsdom
import "./browser.js";

import { fireEvent, render, screen } from "@testing-library/svelte";
import { beforeEach, describe, expect, it, vi } from "vitest";

import Make from "../../src/rooms/make/Make.svelte";
import Problems from "../../src/rooms/make/Problems.svelte";
import LayerMap from "../../src/rooms/model/LayerMap.svelte";
import Outcomes from "../../src/rooms/monitor/Outcomes.svelte";
import { answering } from "./drawn.js";

const text = { anyOf: [{ type: "string" }, { type: "array", items: {} }] };
const method = (name: string, data: string, columns: Record<string, object>, more: Record<string, object> = {}, required: string[] = []) => ({
  name, summary: `what ${name} makes`, data,
  request: { required: ["name", data, ...required], properties: { name: { type: "string" }, [data]: { type: "array", items: { type: "object", required: Object.keys(columns), properties: columns } }, ...more } },
});
const METHODS = [
  method("pca_pairwise", "pairs", { positive: text, negative: text }),
  method("mean_difference", "pairs", { positive: text, negative: text }, { token: { anyOf: [{ enum: ["last", "mean"], type: "string" }, { type: "integer" }], default: "last" }, draws: { type: "integer", default: 20 } }),
  method("condition", "examples", { text, label: { type: "string" } }, { target: { type: "string" } }, ["target"]),
];

describe("problems in the data", () => {
  it("are named before anything runs, the first few of many", () => {
    render(Problems, { props: { data: "pairs", given: true, found: { rows: [{ label: "a" }, { label: "a" }], errors: Array.from({ length: 7 }, (_, i) => `Row ${i} lacks “text”.`), warnings: ["2 are few."] } } });
    expect(document.body.textContent).toMatch(/2\s*pairs can be used/);
    expect(screen.getAllByText(/lacks “text”/)).toHaveLength(5);
    expect(screen.getByText("And 2 more lines.")).toBeTruthy();
    expect(screen.getByText("2 are few.")).toBeTruthy();
  });
});

describe("making an artifact", () => {
  let sent: unknown[] = [];
  beforeEach(() => {
    sent = [];
    answering({
      extractionMethods: () => METHODS,
      startExtraction: (...given) => (sent = given, { id: "job-1", status: "queued", progress: 0 }),
      wait: () => new Promise(() => undefined),
    });
  });

  it("leads from the data to the methods that take it, and sends the rows with what was filled in", async () => {
    render(Make);
    const kinds = await screen.findByLabelText("What your examples are");
    expect(screen.getAllByRole("radio").map((one) => one.parentElement?.querySelector("strong")?.textContent)).toEqual(["mean difference", "pca pairwise"]);
    await fireEvent.change(kinds, { target: { value: "text,label" } });
    expect(screen.getByText("What condition makes.")).toBeTruthy();
    await fireEvent.input(screen.getByLabelText("Examples"), { target: { value: "text,label\nhello,greeting\nbye,farewell" } });
    await fireEvent.input(screen.getByLabelText("Name"), { target: { value: "greets" } });
    const target = screen.getByRole("combobox", { name: /Target/ });
    expect([...(target as HTMLInputElement).list!.options].map((one) => one.value)).toEqual(["greeting", "farewell"]);
    await fireEvent.input(target, { target: { value: "greeting" } });
    await fireEvent.submit(screen.getByRole("button", { name: "Make it" }).closest("form")!);
    await vi.waitFor(() => expect(sent).toEqual(["condition", { name: "greets", examples: [{ text: "hello", label: "greeting" }, { text: "bye", label: "farewell" }], target: "greeting" }]));
  });

  it("says what has to be filled in", async () => {
    render(Make);
    await fireEvent.change(await screen.findByLabelText("What your examples are"), { target: { value: "text,label" } });
    await fireEvent.input(screen.getByLabelText("Examples"), { target: { value: "text,label\nhello,greeting" } });
    await fireEvent.input(screen.getByLabelText("Name"), { target: { value: "greets" } });
    await fireEvent.submit(screen.getByRole("button", { name: "Make it" }).closest("form")!);
    expect((await screen.findByRole("alert")).textContent).toBe("Fill in “Target”.");
    expect(sent).toEqual([]);
  });
});

describe("a map of layers", () => {
  it("is one stop for the Tab key, with arrows inside", async () => {
    const cell = (strength: number) => ({ text: String(strength), strength });
    const props = $state({ label: "Scores", tokens: ["a", "b"], rows: [{ layer: 5, cells: [cell(0), cell(0.5)] }, { layer: 4, cells: [cell(1), cell(2)] }], chosen: null as { layer: number; column: number } | null });
    render(LayerMap, { props });
    const grid = screen.getByRole("grid", { name: "Scores" });
    for (const key of ["ArrowDown", "ArrowRight", "ArrowRight"]) {
      await fireEvent.keyDown(grid, { key });
    }
    expect(screen.getByRole("gridcell", { selected: true }).textContent).toBe("2");
    expect(screen.getByRole("gridcell", { selected: true }).style.getPropertyValue("--sure")).toBe("1");
  });
});

describe("what answers were", () => {
  it("stands with the untouched model first, then all steering, then each artifact", () => {
    const row = (artifact: string, answers: number, broken: number) => ({ artifact, grader: "refusal", answers, shares: { answered: 1 - broken, broken } });
    render(Outcomes, { props: { rows: [row("calm@1", 9, 0.5), row("all", 12, 0.25), row("untouched", 3, 0)], minutes: [], presets: [], span: 3600, chosen: "all" } });
    const cells = screen.getAllByRole("row").slice(1).map((one) => [...one.querySelectorAll("td")].map((cell) => cell.textContent?.trim()).filter(Boolean));
    expect(cells).toEqual([["untouched", "3", "100 %", "0 %"], ["all steering", "12", "75 %", "25 %"], ["calm@1", "9", "50 %", "50 %"]]);
    expect(document.querySelectorAll("td.damage")).toHaveLength(2);
  });

  it("says how to have some where there are none", () => {
    render(Outcomes, { props: { rows: [], minutes: [], presets: [], span: 3600, chosen: "all" } });
    expect(document.body.textContent).toContain("outcome_sample");
  });
});
