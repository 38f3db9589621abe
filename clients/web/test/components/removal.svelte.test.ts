// @vitest-environment jsdom
import { fireEvent, render, screen } from "@testing-library/svelte";
import { describe, expect, it, vi } from "vitest";

import Removal from "../../src/rooms/library/Removal.svelte";
import "./browser.js";
import { answering, artifact } from "./drawn.js";

const preset = { name: "warm", ref: "warm@1", version: 1, model: "tiny:warm", spec: { interventions: [{ artifact: "calm@1" }] }, description: "", aliases: [] };
const measured = { data: [{ preset: "warm@1", artifact: null, completions: 7, kl_mean: 0.2, first: 0, last: 0 }, { preset: "cold@1", artifact: null, completions: 9, kl_mean: 0.2, first: 0, last: 0 }] };

describe("deleting", () => {
  it("an artifact says which presets and whether the default steering use it", async () => {
    answering({ listPresets: () => ({ data: [preset], cursor: null }), defaultSpec: () => ({ spec: { interventions: [{ artifact: "calm" }] } }) });
    render(Removal, { one: artifact() as never, kind: "artifact", versions: ["calm@1"], onclose: vi.fn(), ondone: vi.fn() });
    expect(await screen.findByRole("link", { name: "warm" })).not.toBeNull();
    expect(document.body.textContent).toContain("The default steering of every request uses it.");
  });

  it("a preset says what is refused from then on, and which answers were made under it", async () => {
    const deletePreset = vi.fn(), ondone = vi.fn();
    answering({ effects: () => measured, deletePreset });
    render(Removal, { one: preset as never, kind: "preset", versions: ["warm@1"], onclose: vi.fn(), ondone });
    await screen.findByText(/7 answers under warm@1/);
    expect(document.body.textContent).toContain("Requests for the model tiny:warm are refused from then on.");
    expect(document.body.textContent).not.toContain("cold");
    await fireEvent.click(screen.getByRole("button", { name: "Delete version 1" }));
    await vi.waitFor(() => expect(ondone).toHaveBeenCalledOnce());
    expect(deletePreset).toHaveBeenCalledWith("warm@1");
  });
});
