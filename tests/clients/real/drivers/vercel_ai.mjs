// Vercel's AI SDK: text whole and streamed, with the receipt from the body and the header.
// Arguments: address, steering as JSON.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const [url, given] = process.argv.slice(2);
const trimtab = createOpenAICompatible({ name: "trimtab", baseURL: `${url}/v1` });
const fields = { model: trimtab("lab-dense"), prompt: "How do I bake a cake?", maxOutputTokens: 16, temperature: 0 };
// What stands under the provider's name goes into the body.
const options = { providerOptions: { trimtab: { steering: JSON.parse(given) } } };

const plain = await generateText(fields);
const steered = await generateText({ ...fields, ...options });
const stream = streamText({ ...fields, ...options });
let streamed = "";
for await (const piece of stream.textStream) streamed += piece;

console.log(JSON.stringify({
  plain: plain.text, steered: steered.text, streamed, receipt: steered.response.body.steering.applied[0].tokens,
  header: (await stream.response).headers["x-trimtab-applied"],
}));
