// Vercel's AI SDK: text whole and streamed, and a loop of tools, with the receipt from the body and the header.
// Arguments: address of lab-dense, steering for it, address of lab-tools, an episode as JSON, steering for it or null.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";

const [url, given, toolsUrl, told, toolSteering] = process.argv.slice(2);
const at = (baseURL) => createOpenAICompatible({ name: "trimtab", baseURL: `${baseURL}/v1` });
const fields = { model: at(url)("lab-dense"), prompt: "How do I bake a cake?", maxOutputTokens: 16, temperature: 0 };
// What stands under the provider's name goes into the body.
const options = { providerOptions: { trimtab: { steering: JSON.parse(given) } } };

const plain = await generateText(fields);
const steered = await generateText({ ...fields, ...options });
const stream = streamText({ ...fields, ...options });
let streamed = "";
for await (const piece of stream.textStream) streamed += piece;

const episode = JSON.parse(told);
const calls = [];
const tools = Object.fromEntries(episode.tools.map(({ function: { name, description, parameters } }) => [name, tool({
  description, inputSchema: jsonSchema(parameters),
  execute: async (input) => {
    calls.push([name, input]);
    return episode.results[calls.length - 1] ?? "Stop.";
  },
})]));
const loop = streamText({
  model: at(toolsUrl)("lab-tools"), messages: episode.messages, tools, temperature: 0, maxOutputTokens: 64,
  stopWhen: stepCountIs(episode.results.length + 1), maxRetries: 0,
  providerOptions: { trimtab: { steering: JSON.parse(toolSteering) } },
});
await loop.consumeStream();
console.log(JSON.stringify({
  plain: plain.text, steered: steered.text, streamed, receipt: steered.response.body.steering.applied[0].tokens,
  header: (await stream.response).headers["x-trimtab-applied"], calls, text: await loop.text,
  steps: (await loop.steps).map((step) => step.text),
}));
