// @vitest-environment jsdom
import { fireEvent, render, screen, within } from "@testing-library/svelte";
import { beforeEach, describe, expect, it, vi } from "vitest";

import { FIRST, newItem, specOf, type Column, type Item } from "../../src/lib/spec.js";
import SpecEditor from "../../src/parts/SpecEditor.svelte";
import InterventionCard from "../../src/rooms/playground/InterventionCard.svelte";
import ReceiptWords from "../../src/rooms/playground/ReceiptWords.svelte";
import SampleView from "../../src/rooms/playground/SampleView.svelte";
import { answering, artifact, calibration, receipt } from "./drawn.js";

const listed = { data: [artifact(), artifact({ name: "loud", ref: "loud@1" }), artifact({ name: "seen", kind: "probe" })], cursor: null };

beforeEach(() => answering({
  getArtifact: (name: string) => artifact({ name, ref: `${name}@1`, card: name === "calm" ? { calibration: {} } : null }),
  calibration: () => calibration,
  listArtifacts: (query: { kind?: string }) => (query.kind === "probe" ? { data: [artifact({ name: "seen", kind: "probe" })], cursor: null } : listed),
  complete: () => ({ choices: [{ prompt_logprobs: [null, null, null, { 7: { logprob: -0.1, rank: 1, decoded_token: " bread" } }] }] }),
}));

describe("the dose slider", () => {
  const drawn = (item: Item, onrun = vi.fn()) => {
    const props = $state({ item, ask: FIRST.ask, number: 0, onremove: vi.fn(), onrun });
    render(InterventionCard, { props });
    return props;
  };

  it("is in nats where a calibration exists, with the band that kept text whole and what random vectors do", async () => {
    const props = drawn({ ...newItem("calm"), strength: { kind: "dose", kl: 0.4 } });
    const slider = await screen.findByRole("slider");
    expect(slider.getAttribute("aria-valuetext")).toBe("0.40 nats");
    expect(document.querySelector("rect.whole")).not.toBeNull();
    expect(document.body.textContent).toContain("Text stayed whole from -0.20 nats to 0.40 nats (green). A random vector of this size: 0.020 nats.");
    await fireEvent.input(slider, { target: { value: "1" } });
    expect(props.item.strength).toEqual({ kind: "dose", kl: 2 });
    expect(document.body.textContent).toContain("Beyond that band.");
    await fireEvent.change(slider);
    expect(props.onrun).toHaveBeenCalledOnce();
  });

  it("is raw without one, with the strength of the card marked", async () => {
    drawn(newItem("loud"));
    const slider = await screen.findByRole("slider");
    expect(slider.getAttribute("aria-valuetext")).toBe("2 raw");
    expect(document.body.textContent).toContain("its card says 2 raw");
    expect(document.querySelector("rect.mark")).not.toBeNull();
    expect(screen.queryByRole("radio", { name: "dose" })).toBeNull();
  });
});

describe("the editor of a spec", () => {
  it("adds, orders, switches off and removes interventions, and guards them", async () => {
    const props = $state<{ spec: Column; ask: null }>({ spec: { preset: "", items: [], guard: null }, ask: null });
    render(SpecEditor, { props });
    for (const name of ["calm", "loud"]) {
      await fireEvent.focus(screen.getByRole("combobox", { name: "Add an intervention" }));
      await fireEvent.click(await screen.findByRole("option", { name: new RegExp(name) }));
    }
    // What only reads is not offered.
    await fireEvent.focus(screen.getByRole("combobox", { name: "Add an intervention" }));
    await screen.findByRole("option", { name: /calm/ });
    expect(screen.queryByRole("option", { name: /seen/ })).toBeNull();
    await fireEvent.click(screen.getByRole("button", { name: "Move loud up" }));
    expect(specOf(props.spec)).toEqual({ interventions: [{ artifact: "loud" }, { artifact: "calm" }] });
    await fireEvent.click(screen.getAllByRole("checkbox", { name: "on" })[0]!);
    await fireEvent.click(screen.getByRole("checkbox", { name: /Guard/ }));
    expect(specOf(props.spec)).toEqual({ interventions: [{ artifact: "calm" }], guard: { max_kl: 1, max_repetition: 0.5 } });
    await fireEvent.click(screen.getByRole("button", { name: "Remove calm" }));
    expect(props.spec.items.map((one) => one.artifact)).toEqual(["loud"]);
  });
});

describe("the heat map", () => {
  const sample = { text: "Good bread", tokens: [{ text: "Good", logprob: -0.5, top: [{ text: "Good", logprob: -0.5 }] }, { text: " cake", logprob: -1, top: [{ text: " cake", logprob: -1 }] }], ids: [5, 6], finish: "stop" };
  const props = { sample, perToken: receipt.effects.choices[0]!.per_token as never, applied: receipt.applied as never, number: null, waiting: false, heat: true, promptIds: [1, 2], onfork: vi.fn() };
  const strengths = () => screen.getAllByRole("option").map((one) => one.style.getPropertyValue("--strength"));

  it("colours tokens by the figure that is asked for", async () => {
    const { rerender } = render(SampleView, { props });
    expect(strengths()).toEqual(["0.1", "1"]);
    await rerender({ ...props, by: "surprise" });
    expect(strengths()).toEqual(["0.1", "0.8"]);
    await rerender({ ...props, by: "which" });
    expect(strengths()).toEqual(["1", "1"]);
  });

  it("tells at a token what both models would have said, and goes on from there", async () => {
    const onfork = vi.fn();
    render(SampleView, { props: { ...props, onfork } });
    await fireEvent.keyDown(screen.getByRole("listbox"), { key: "ArrowRight" });
    expect(document.body.textContent).toContain("surprise to the untouched model 4 nats, its rank there 13");
    expect(await screen.findByText(/bread/, { selector: "dd code" })).toBeTruthy();
    await fireEvent.click(screen.getByRole("button", { name: "Go on from here" }));
    expect(onfork).toHaveBeenCalledWith({ ids: [1, 2, 5, 6], text: "Good cake" });
  });
});

describe("a receipt", () => {
  it("is told in words, beside what a random artifact of that size does", async () => {
    render(ReceiptWords, { props: { receipt: receipt as never } });
    const list = within(screen.getByRole("list"));
    expect(await list.findByText("calm@1 added at layer 3 to 31 tokens, which moved the answer by 0.42 nats a token (its card says 0.40 nats); a random one of that size: 0.020 nats.")).toBeTruthy();
    expect(document.body.textContent).toContain("25 %");
  });
});
