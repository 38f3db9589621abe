/** One column's answers while they stream, and what was measured of them. */

import type { Delta, Receipt, Usage } from "@trimtab/client";

import { said, server } from "./server.svelte.js";
import { bodyOf, type Ask } from "./spec.js";

export interface Token {
  text: string;
  logprob: number | null;
  top: { text: string; logprob: number }[];
}

export interface Sample {
  text: string;
  tokens: Token[];
  /** Of the tokens; what the browser shows is not enough to ask for them again. */
  ids: number[];
  finish: string | null;
}

export class Answer {
  samples = $state.raw<Sample[]>([]);
  /** Ids of the prompt, once the first piece has come. */
  promptIds = $state.raw<number[]>([]);
  receipt = $state<Receipt | null>(null);
  usage = $state<Usage | null>(null);
  failure = $state("");
  running = $state(false);
  #stop: AbortController | null = null;

  /** Ask, and fill in what comes. An earlier question that still runs is left. */
  async ask(ask: Ask, steering: Record<string, unknown> | null): Promise<void> {
    this.stop();
    const stop = (this.#stop = new AbortController());
    this.samples = Array.from({ length: ask.n }, () => ({ text: "", tokens: [], ids: [], finish: null }));
    this.promptIds = [];
    this.receipt = this.usage = null;
    this.failure = "";
    this.running = true;
    try {
      const wanted = steering === null ? null : { ...steering, report: "tokens" };
      const { messages, prompt, ...fields } = bodyOf(ask, server.model, wanted as never) as Record<string, never>;
      const asked = {
        ...fields,
        signal: stop.signal,
        stream_options: { include_usage: true },
        return_token_ids: true,
        ...(messages !== undefined ? { logprobs: true, top_logprobs: 5 } : { logprobs: 5 }),
      } as never;
      const deltas =
        messages !== undefined
          ? server.client.streamChat(messages as never, asked)
          : server.client.streamComplete(prompt as never, asked);
      for await (const delta of frames(deltas)) {
        this.#take(delta);
      }
    } catch (error) {
      if (!stop.signal.aborted) {
        this.failure = said(error);
        server.failed(error);
      }
    } finally {
      if (this.#stop === stop) {
        this.running = false;
      }
    }
  }

  stop(): void {
    this.#stop?.abort();
    this.#stop = null;
    this.running = false;
  }

  /** All that came since the last picture at once, as each change of a long answer costs one look at all of it. */
  #take(deltas: Delta[]): void {
    const samples = [...this.samples];
    for (const delta of deltas) {
      const sample = samples[delta.index];
      if (sample !== undefined) {
        samples[delta.index] = {
          text: sample.text + delta.text,
          tokens: sample.tokens,
          ids: sample.ids,
          finish: delta.finishReason ?? sample.finish,
        };
        sample.tokens.push(...delta.tokens);
        sample.ids.push(...delta.ids);
      }
      if (delta.promptIds !== null) {
        this.promptIds = delta.promptIds;
      }
      this.receipt = delta.steering ?? this.receipt;
      this.usage = delta.usage ?? this.usage;
    }
    this.samples = samples;
  }
}

/** What came since the last picture, once per picture: a fast stream must not lay the page out for every token. */
async function* frames<T>(source: AsyncGenerator<T, void, void>): AsyncGenerator<T[], void, void> {
  let waiting: T[] = [];
  let over = false;
  let failure: unknown;
  let wake: () => void = () => undefined;
  const reading = (async () => {
    try {
      for await (const one of source) {
        waiting.push(one);
        wake();
      }
    } catch (error) {
      failure = error;
    }
    over = true;
    wake();
  })();
  try {
    for (;;) {
      if (waiting.length === 0 && !over) {
        await new Promise<void>((resolve) => (wake = resolve));
      }
      if (!over) {
        await painted();
      }
      const found = waiting;
      waiting = [];
      if (found.length > 0) {
        yield found;
      } else if (over) {
        break;
      }
    }
    if (failure !== undefined) {
      throw failure;
    }
  } finally {
    await source.return();
    await reading;
  }
}

/** The next picture; in a tab that nobody sees there is none, so a little while. */
function painted(): Promise<void> {
  return new Promise((resolve) => {
    if (document.hidden) {
      setTimeout(resolve, 100);
    } else {
      requestAnimationFrame(() => resolve());
    }
  });
}
