// @vitest-environment jsdom
import { fireEvent, render, screen } from "@testing-library/svelte";
import { describe, expect, it, vi } from "vitest";

import NewRollout from "../../src/rooms/rollouts/NewRollout.svelte";
import RolloutPage from "../../src/rooms/rollouts/RolloutPage.svelte";
import Rollouts from "../../src/rooms/rollouts/Rollouts.svelte";
import "./browser.js";
import { rail, rollout } from "../rolled.js";
import { answering } from "./drawn.js";

const effects = () => ({ data: [], outcomes: [] });
const version = (number: number, aliases: string[]) => ({ name: "warm", ref: `warm@${number}`, version: number, aliases });

describe("the list", () => {
  it("shows each with its state, its share and its nearest guard rail", async () => {
    answering({ rollouts: () => [rollout({ rails: [rail({ candidate_samples: 60, evidence: 0.8 })] }), rollout({ id: "ro-2", target: "cold@production", status: "returned" })] });
    render(Rollouts);
    const [, first, second] = (await screen.findAllByRole("row")).map((row) => row.textContent ?? "");
    expect(first).toContain("at work");
    expect(first).toContain("5.0 %");
    expect(first).toContain("refusals");
    expect(first).toContain("close");
    expect(second).toContain("cold@productionreturned");
  });
});

describe("a roll-out", () => {
  it("that ended by itself says why, and offers nothing but to delete it", async () => {
    const why = "the guard rail refusals is broken: 0.4 with the candidate, 0.05 with the stable version, a margin of 0.02";
    const ended = rollout({ status: "returned", history: [...rollout().history, { at: "2026-01-01T11:00:00Z", what: "returned", by: "roll-out", tenant: "", why }] });
    answering({ getRollout: () => ended, effects });
    render(RolloutPage, { id: "ro-1" });
    expect(await screen.findByText(/Returned by the roll-out itself/)).not.toBeNull();
    expect(document.body.textContent).toContain(why);
    expect(screen.queryByRole("button", { name: "Return…" })).toBeNull();
    expect(screen.getByRole("button", { name: "Delete…" })).not.toBeNull();
  });

  it("is returned only after a second look, with the reason that was written", async () => {
    const returnRollout = vi.fn(() => rollout({ status: "returned" }));
    answering({ getRollout: () => rollout(), effects, returnRollout });
    render(RolloutPage, { id: "ro-1" });
    await fireEvent.click(await screen.findByRole("button", { name: "Return…" }));
    expect(returnRollout).not.toHaveBeenCalled();
    await fireEvent.input(screen.getByLabelText(/Why/), { target: { value: "too warm" } });
    await fireEvent.click(screen.getByRole("button", { name: "Return it", hidden: true }));
    await vi.waitFor(() => expect(returnRollout).toHaveBeenCalledWith("ro-1", "too warm"));
    expect(await screen.findByText("returned")).not.toBeNull();
  });
});

describe("the form", () => {
  it("takes the version of the alias as stable and another one as candidate", async () => {
    const createRollout = vi.fn(() => rollout({ status: "draft" })), onmade = vi.fn();
    answering({ listPresets: () => ({ data: [version(2, [])], cursor: null }), presetVersions: () => ({ data: [version(2, []), version(1, ["production"])] }), createRollout });
    render(NewRollout, { onclose: vi.fn(), onmade });
    await vi.waitFor(() => expect(screen.getByRole("option", { name: "warm", hidden: true })).not.toBeNull());
    await fireEvent.change(screen.getByLabelText("Name"), { target: { value: "warm" } });
    await vi.waitFor(() => expect((screen.getByRole("button", { name: "Make the draft", hidden: true }) as HTMLButtonElement).disabled).toBe(false));
    await fireEvent.click(screen.getByRole("button", { name: "Make the draft", hidden: true }));
    await vi.waitFor(() => expect(onmade).toHaveBeenCalledOnce());
    expect(createRollout).toHaveBeenCalledWith(expect.objectContaining({ collection: "preset", target: "warm@production", candidate: 2, then: "hold" }));
  });

  it("asks which version is stable where the name has no alias", async () => {
    const setPresetAlias = vi.fn();
    answering({ listPresets: () => ({ data: [version(2, [])], cursor: null }), presetVersions: () => ({ data: [version(2, []), version(1, [])] }), setPresetAlias });
    render(NewRollout, { onclose: vi.fn(), onmade: vi.fn() });
    await vi.waitFor(() => expect(screen.getByRole("option", { name: "warm", hidden: true })).not.toBeNull());
    await fireEvent.change(screen.getByLabelText("Name"), { target: { value: "warm" } });
    await fireEvent.click(await screen.findByRole("button", { name: "Point production at version 1", hidden: true }));
    expect(setPresetAlias).toHaveBeenCalledWith("warm", "production", 1);
  });
});
