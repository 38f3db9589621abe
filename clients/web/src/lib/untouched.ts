/** What the untouched model would have said at each token of an answer, asked once for an answer that somebody looks at. */

import { likeliest, SHOWN, type Instead, type Place } from "./likeliest.js";
import { server } from "./server.svelte.js";

interface Scored {
  choices: { prompt_logprobs?: Place[] | null }[];
}

/** One list for each of `ids`, the likeliest first. */
export async function untouched(promptIds: readonly number[], ids: readonly number[], signal: AbortSignal): Promise<Instead[][]> {
  const answer = (await server.client.complete([...promptIds, ...ids], {
    model: server.model,
    max_tokens: 0,
    prompt_logprobs: SHOWN,
    steering: { default: "none" } as never,
    signal,
  } as never)) as unknown as Scored;
  return (answer.choices[0]?.prompt_logprobs ?? []).slice(promptIds.length).map(likeliest);
}
