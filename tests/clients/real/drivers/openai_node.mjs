// OpenAI's package for Node: chat whole and streamed, a response, and where the receipt is in each.
// Arguments: address, steering as JSON.
import OpenAI from "openai";

const [url, given] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0 });
const messages = [{ role: "user", content: "How do I bake a cake?" }];
const fields = { model: "lab-dense", messages, max_tokens: 16, temperature: 0 };
const steering = JSON.parse(given);

const plain = await client.chat.completions.create(fields);
const { data: steered, response } = await client.chat.completions.create({ ...fields, steering }).withResponse();
let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...fields, steering, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}
const answer = await client.responses.create({
  model: "lab-dense", input: messages[0].content, max_output_tokens: 16, temperature: 0, steering,
});
let refused = null;
try {
  await client.chat.completions.create({ ...fields, model: "nothing" });
} catch (error) {
  refused = error instanceof OpenAI.NotFoundError ? error.code : String(error);
}
console.log(JSON.stringify({
  plain: plain.choices[0].message.content, steered: steered.choices[0].message.content, streamed,
  response: answer.output_text, receipt: steered.steering.applied[0].tokens,
  response_receipt: answer.steering.applied[0].tokens, header: response.headers.get("x-trimtab-applied"), refused,
}));
