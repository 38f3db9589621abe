/** What goes over the wire, against a scripted server. */

import assert from "node:assert/strict";
import { once } from "node:events";
import { test } from "node:test";

import { Client, ConnectionFailed, JobFailed, NotFound, Overloaded, ServerFailed } from "../src/index.js";
import { json, scripted } from "./server.js";

const RECEIPT = { applied: [], disabled: false, engine: "transformers" };

function chunk(text: string, extra: object = {}): string {
  const body = { choices: [{ index: 0, delta: { content: text }, finish_reason: null }], ...extra };
  return `data: ${JSON.stringify(body)}\n\n`;
}

test("a chat sends the base model, the message and the interventions", async () => {
  const server = await scripted((asked, response) =>
    json(response, asked.url === "/v1/models" ? { data: [{ id: "lab" }, { id: "lab:calm" }] } : { choices: [] }),
  );
  await new Client({ baseUrl: `${server.url}/`, apiKey: "s3cret" }).chat("Hello", { steering: ["calm", "past@2"], max_tokens: 3 });
  const sent = server.asked[1];
  assert.equal(sent?.headers.authorization, "Bearer s3cret");
  assert.deepEqual(JSON.parse(sent?.body ?? ""), {
    model: "lab",
    messages: [{ role: "user", content: "Hello" }],
    steering: { interventions: [{ artifact: "calm" }, { artifact: "past@2" }] },
    max_tokens: 3,
  });
  await server.close();
});

test("names are one segment of the path, whatever they hold", async () => {
  const server = await scripted((_, response) => json(response, {}));
  await new Client({ baseUrl: `${server.url}/behind/a/prefix` }).getArtifact("../admin@1?x");
  assert.equal(server.asked[0]?.url, "/behind/a/prefix/v1/artifacts/..%2Fadmin@1%3Fx");
  await server.close();
});

test("a refusal carries code, field, request id and when to try again", async () => {
  const error = { message: "no such artifact", type: "invalid_request_error", param: "ref", code: "not_found" };
  const server = await scripted((asked, response) =>
    asked.url.endsWith("busy")
      ? json(response, { error: { ...error, code: "overloaded", param: null } }, 503, { "Retry-After": "7" })
      : json(response, { error }, 404, { "X-Request-ID": "req-1" }),
  );
  const client = new Client({ baseUrl: server.url });
  await assert.rejects(client.getArtifact("gone"), (raised) => {
    assert.ok(raised instanceof NotFound);
    assert.deepEqual(
      [raised.name, raised.status, raised.code, raised.param, raised.requestId, raised.retryAfter, raised.message],
      ["NotFound", 404, "not_found", "ref", "req-1", null, "no such artifact"],
    );
    return true;
  });
  await assert.rejects(client.getArtifact("busy"), (raised) => raised instanceof Overloaded && raised.retryAfter === 7);
  await server.close();
});

test("an answer that no Trimtab server gives is said to be one", async () => {
  const server = await scripted((_, response) => {
    response.writeHead(502);
    response.end("<html>Bad gateway</html>");
  });
  await assert.rejects(new Client({ baseUrl: server.url }).models(), ConnectionFailed);
  await server.close();
  await assert.rejects(new Client({ baseUrl: server.url }).models(), ConnectionFailed);
});

test("a stream is read however it is cut into packets", async () => {
  const text = [": keep-alive\r\n\r\n", chunk("Grüße "), chunk("🌍", { steering: RECEIPT }), "data: [DONE]\n\n"].join("");
  const server = await scripted(async (_, response) => {
    response.writeHead(200, { "Content-Type": "text/event-stream" });
    for (const byte of Buffer.from(text)) {
      if (!response.write(Buffer.of(byte))) {
        await once(response, "drain");
      }
    }
    response.end();
  });
  const found = [];
  for await (const delta of new Client({ baseUrl: server.url }).streamChat("Hi", { model: "m" })) {
    found.push(delta);
  }
  assert.deepEqual(found.map((delta) => delta.text), ["Grüße ", "🌍"]);
  assert.deepEqual(found.at(-1)?.steering, RECEIPT);
  await server.close();
});

test("tokens of a stream come with their alternatives, of a chat and of a completion", async () => {
  const chat = { content: [{ token: "a", logprob: -1, bytes: [97], top_logprobs: [{ token: "b", logprob: -0.5, bytes: [98] }] }] };
  const plain = { tokens: ["a"], token_logprobs: [-1], top_logprobs: [{ b: -0.5 }], text_offset: [0] };
  const server = await scripted((asked, response) => {
    const choice = asked.url.includes("chat") ? { delta: { content: "a" }, logprobs: chat } : { text: "a", logprobs: plain };
    response.end(`data: ${JSON.stringify({ choices: [{ index: 0, ...choice }] })}\n\ndata: [DONE]\n\n`);
  });
  const client = new Client({ baseUrl: server.url });
  for (const stream of [client.streamChat("x", { model: "m" }), client.streamComplete("x", { model: "m" })]) {
    for await (const delta of stream) {
      assert.deepEqual(delta.tokens, [{ text: "a", logprob: -1, top: [{ text: "b", logprob: -0.5 }] }]);
    }
  }
  assert.equal(server.asked.length, 2);
  await server.close();
});

test("an error inside a stream is thrown, and so is a stream that breaks off", async () => {
  const failed = `data: ${JSON.stringify({ error: { message: "it overflowed", code: "steering_overflow", param: null } })}\n\n`;
  const server = await scripted((asked, response) => {
    response.writeHead(200);
    response.end(chunk("He") + (asked.body.includes("overflow") ? `${failed}data: [DONE]\n\n` : ""));
  });
  const client = new Client({ baseUrl: server.url });
  const texts: string[] = [];
  const read = async (prompt: string) => {
    for await (const delta of client.streamChat(prompt, { model: "m" })) {
      texts.push(delta.text);
    }
  };
  await assert.rejects(read("overflow"), (raised) => raised instanceof ServerFailed && raised.code === "steering_overflow");
  await assert.rejects(read("cut"), ConnectionFailed);
  assert.deepEqual(texts, ["He", "He"]);
  await server.close();
});

test("leaving a stream early, or aborting it, closes the connection", async () => {
  const gone: Promise<unknown>[] = [];
  const server = await scripted((_, response) => {
    gone.push(once(response, "close"));
    response.writeHead(200);
    response.write(chunk("one") + chunk("two"));
  });
  const client = new Client({ baseUrl: server.url });
  for await (const delta of client.streamChat("Hi", { model: "m" })) {
    assert.equal(delta.text, "one");
    break;
  }
  const stop = new AbortController();
  const reason = new Error("enough");
  await assert.rejects(async () => {
    for await (const delta of client.streamChat("Hi", { model: "m", signal: stop.signal })) {
      assert.ok(delta);
      stop.abort(reason);
    }
  }, reason);
  assert.equal(gone.length, 2);
  await Promise.all(gone);
  await server.close();
});

test("waiting for a job tells its progress and throws how it failed", async () => {
  let asked = 0;
  const server = await scripted((request, response) => {
    asked += 1;
    const error = { message: "the job found no direction", code: "fit_failed", param: "pairs" };
    const failed = request.url.endsWith("bad");
    json(response, asked < 3 ? { id: "j", status: "running", progress: asked / 3 } : { id: "j", status: failed ? "failed" : "succeeded", result: {}, error });
  });
  const client = new Client({ baseUrl: server.url });
  const seen: string[] = [];
  assert.equal((await client.wait("good", { onProgress: (job) => seen.push(job.status) })).status, "succeeded");
  assert.deepEqual(seen, ["running", "running", "succeeded"]);
  await assert.rejects(client.wait("bad"), (raised) => raised instanceof JobFailed && raised.code === "fit_failed");
  await server.close();
});
