/** What a model would have said in place of a token. */

export const SHOWN = 5;

export interface Instead {
  text: string;
  logprob: number;
}

/** One place of `prompt_logprobs`: by token id; null where nothing predicts it. */
export type Place = Record<string, { logprob: number; rank: number; decoded_token: string }> | null;

/** The likeliest of one place; the token itself stands among them only where it is one. */
export function likeliest(place: Place): Instead[] {
  return Object.values(place ?? {})
    .filter((one) => one.rank <= SHOWN)
    .sort((a, b) => a.rank - b.rank)
    .map((one) => ({ text: one.decoded_token, logprob: one.logprob }));
}
