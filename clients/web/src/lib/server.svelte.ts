/** The server that this page came from: its client, the key, and whether it answers. */

import { Client, ConnectionFailed, Overloaded, TrimtabError, Unauthorized, type OwnKey } from "@trimtab/client";

const KEY = "trimtab.key";
const AGAIN_MS = 2000;

export type Standing = "connecting" | "ready" | "locked" | "gone";

export interface Capabilities {
  model_name: string;
  engine: string;
  family: string;
  fingerprint: string;
  num_layers: number;
  d_model: number;
  dtype: string;
  device: string;
  context_length: number;
  sites: Record<string, { layers: number[]; width: number; ops: string[] }>;
  ops: Record<string, { sites: string[]; kinds: string[]; strength_units: string[] }>;
  [more: string]: unknown;
}

class Server {
  standing = $state<Standing>("connecting");
  /** Why it is not ready, in the server's words. */
  reason = $state("");
  models = $state<string[]>([]);
  capabilities = $state<Capabilities | null>(null);
  hasKey = $state(false);
  /** Whose key this is and what it may do. A server that asks for no key lets everybody do everything. */
  own = $state<OwnKey | null>(null);
  client: Client;
  readonly base = new URL(".", document.baseURI).href.replace(/\/$/, "");
  #key = sessionStorage.getItem(KEY);
  #timer: ReturnType<typeof setTimeout> | undefined;

  constructor() {
    this.client = this.#made();
  }

  /** Whether the key may do what needs a role; before that is known, whatever it tries is for the server to judge. */
  may(role: string): boolean {
    const roles: readonly string[] | undefined = this.own?.roles;
    return roles === undefined || roles.includes(role) || roles.includes("admin");
  }

  get model(): string {
    return this.models[0] ?? "";
  }

  /** The key stays in this tab and is gone when it is closed. */
  use(key: string): Promise<void> {
    this.#key = key.trim() || null;
    if (this.#key === null) {
      sessionStorage.removeItem(KEY);
    } else {
      sessionStorage.setItem(KEY, this.#key);
    }
    this.client = this.#made();
    return this.connect();
  }

  async connect(): Promise<void> {
    clearTimeout(this.#timer);
    try {
      const [models, capabilities, own] = await Promise.all([this.client.models(), this.client.capabilities(), this.client.ownKey()]);
      this.models = models;
      this.own = own;
      this.capabilities = capabilities as Capabilities;
      this.standing = "ready";
      this.reason = "";
    } catch (error) {
      this.failed(error);
    }
  }

  /** Take note of an error of any call: a key that is missing or a server that is gone concern the whole page. */
  failed(error: unknown): void {
    if (error instanceof Unauthorized) {
      this.standing = "locked";
      this.reason = this.#key === null ? "" : error.message;
    } else if (error instanceof ConnectionFailed || error instanceof Overloaded) {
      this.standing = "gone";
      this.reason = error.message;
      clearTimeout(this.#timer);
      this.#timer = setTimeout(() => void this.connect(), AGAIN_MS);
    }
  }

  async refreshModels(): Promise<void> {
    this.models = await this.client.models();
  }

  #made(): Client {
    this.hasKey = this.#key !== null;
    return new Client({ baseUrl: this.base, ...(this.#key === null ? {} : { apiKey: this.#key }) });
  }
}

export const server = new Server();

/** An error in words for the page. */
export function said(error: unknown): string {
  if (error instanceof TrimtabError || error instanceof Error) {
    return error.message;
  }
  return String(error);
}
