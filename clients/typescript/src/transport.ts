/** One request over fetch, whole or as a stream of server-sent events. */

import { ConnectionFailed, refused, TrimtabError } from "./errors.js";
import type { paths } from "./requests.js";

export type Method = "GET" | "POST" | "PUT" | "PATCH" | "DELETE";

export interface ClientOptions {
  /** Address of the server, with the path prefix it is behind, if any. */
  baseUrl?: string;
  apiKey?: string;
  /** Takes the place of the global fetch. */
  fetch?: typeof fetch;
}

export interface CallOptions {
  /** Ends the request when it is aborted; the server stops generating then. */
  signal?: AbortSignal;
}

export interface Call extends CallOptions {
  path?: Record<string, string>;
  query?: Record<string, string | number | boolean | null | undefined>;
  json?: unknown;
  content?: Uint8Array | Blob;
}

export class Transport {
  readonly #base: string;
  readonly #headers: Record<string, string>;
  readonly #fetch: typeof fetch;

  constructor(options: ClientOptions) {
    this.#base = (options.baseUrl ?? "http://127.0.0.1:8000").replace(/\/+$/, "");
    this.#headers = options.apiKey === undefined ? {} : { Authorization: `Bearer ${options.apiKey}` };
    // The browser's fetch must be called as a method of the window.
    this.#fetch = options.fetch ?? ((input, init) => globalThis.fetch(input, init));
  }

  /** The answer, if its status is below 400; anything else is thrown as a TrimtabError. */
  async send(method: Method, template: keyof paths, call: Call = {}): Promise<Response> {
    const headers = { ...this.#headers };
    let body: RequestInit["body"] = null;
    if (call.content !== undefined) {
      headers["Content-Type"] = "application/octet-stream";
      body = call.content as Blob;
    } else if (call.json !== undefined) {
      headers["Content-Type"] = "application/json";
      body = JSON.stringify(call.json);
    }
    const url = this.#base + filled(template, call.path ?? {}) + queryOf(call.query ?? {});
    let response: Response;
    try {
      response = await this.#fetch(url, { method, headers, body, signal: call.signal ?? null });
    } catch (error) {
      throw failure(error, call.signal, `${method} ${url}`);
    }
    if (response.status >= 400) {
      throw refused(response.status, parsed(await response.text().catch(() => "")), response.headers);
    }
    return response;
  }

  async json<T>(method: Method, template: keyof paths, call: Call = {}): Promise<T> {
    const response = await this.send(method, template, call);
    const found = parsed(await response.text());
    if (found === undefined) {
      throw new ConnectionFailed(`${method} ${template}: the answer is not JSON`);
    }
    return found as T;
  }

  async bytes(method: Method, template: keyof paths, call: Call = {}): Promise<Uint8Array> {
    return new Uint8Array(await (await this.send(method, template, call)).arrayBuffer());
  }

  /** The answer's bytes as they come. Leaving the iteration early closes the connection. */
  async *pieces(method: Method, template: keyof paths, call: Call): AsyncGenerator<Uint8Array, void, void> {
    const reader = (await this.send(method, template, call)).body?.getReader();
    if (reader === undefined) {
      throw new ConnectionFailed(`${method} ${template}: the answer has no body`);
    }
    try {
      for (let read = await reader.read(); !read.done; read = await reader.read()) {
        yield read.value;
      }
    } catch (error) {
      throw failure(error, call.signal, `${method} ${template}`);
    } finally {
      await reader.cancel().catch(() => undefined);
    }
  }

  /** The data of each event up to `[DONE]`. Leaving the iteration early closes the connection. */
  async *events(method: Method, template: keyof paths, call: Call): AsyncGenerator<unknown, void, void> {
    const response = await this.send(method, template, call);
    if (response.body === null) {
      throw new ConnectionFailed(`${method} ${template}: the answer has no body`);
    }
    try {
      for await (const data of eventData(response.body)) {
        if (data === "[DONE]") {
          return;
        }
        const event = parsed(data);
        if (event === undefined) {
          throw new ConnectionFailed(`${method} ${template}: an event is not JSON`);
        }
        if (typeof event === "object" && event !== null && "error" in event) {
          // The status was sent before it failed; a stream has no other place to say so.
          throw refused(500, event);
        }
        yield event;
      }
    } catch (error) {
      throw failure(error, call.signal, `${method} ${template}`);
    }
    throw new ConnectionFailed(`${method} ${template}: the stream ended before it was done`);
  }
}

/** The `data` of server-sent events, joined over lines as the standard says; comments and other fields are skipped. */
async function* eventData(body: ReadableStream<Uint8Array>): AsyncGenerator<string, void, void> {
  const reader = body.pipeThrough(new TextDecoderStream() as ReadableWritablePair<string, Uint8Array>).getReader();
  let rest = "";
  let lines: string[] = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) {
        return;
      }
      const parts = (rest + value).split("\n");
      rest = parts.pop() ?? "";
      for (const part of parts) {
        const line = part.endsWith("\r") ? part.slice(0, -1) : part;
        if (line === "" && lines.length > 0) {
          yield lines.join("\n");
          lines = [];
        } else if (line.startsWith("data:")) {
          lines.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
    }
  } finally {
    // Also when the reader of the events leaves early: the server notices and stops generating.
    await reader.cancel().catch(() => undefined);
  }
}

function filled(template: string, values: Record<string, string>): string {
  return template.replace(/\{(\w+)\}/g, (_, name: string) => {
    const value = values[name];
    if (value === undefined) {
      throw new TypeError(`${template} needs ${name}`);
    }
    // A slash in a name must not become another path; "@" may stay as it is.
    return encodeURIComponent(value).replaceAll("%40", "@");
  });
}

function queryOf(values: NonNullable<Call["query"]>): string {
  const given = Object.entries(values).filter(([, value]) => value !== undefined && value !== null);
  return given.length === 0 ? "" : `?${new URLSearchParams(given.map(([name, value]) => [name, String(value)]))}`;
}

function parsed(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** What the caller sees of an exception of fetch: its own abort as it is, anything else as ConnectionFailed. */
function failure(error: unknown, signal: AbortSignal | undefined, where: string): unknown {
  if (error instanceof TrimtabError || signal?.aborted) {
    return error;
  }
  return new ConnectionFailed(`no answer of ${where}: ${error instanceof Error ? error.message : String(error)}`, {
    cause: error,
  });
}
