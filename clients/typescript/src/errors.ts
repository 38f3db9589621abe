/** What can go wrong, as classes. Every refusal of the server carries its stable `code` and the field it is about. */

/** Base of all errors of this package. */
export class TrimtabError extends Error {
  constructor(message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = new.target.name;
  }
}

/** The server did not answer, or what answered is not a Trimtab server. */
export class ConnectionFailed extends TrimtabError {}

/** A job failed or was cancelled. `code` and `param` are those of the refusal, where there is one. */
export class JobFailed extends TrimtabError {
  constructor(
    message: string,
    readonly jobId: string,
    readonly code: string | null,
    readonly param: string | null,
  ) {
    super(message);
  }
}

export interface Refusal {
  status: number;
  /** Stable, to switch on; docs/errors.md lists every code. */
  code: string;
  /** The field that is wrong, where one is. */
  param: string | null;
  /** Names the request in the server's log. */
  requestId: string | null;
  /** Seconds after which the same request may succeed, where the server says so. */
  retryAfter: number | null;
}

/** The server refused the request, or failed on it. */
export class ServerRefused extends TrimtabError implements Refusal {
  readonly status: number;
  readonly code: string;
  readonly param: string | null;
  readonly requestId: string | null;
  readonly retryAfter: number | null;

  constructor(message: string, refusal: Refusal) {
    super(message);
    this.status = refusal.status;
    this.code = refusal.code;
    this.param = refusal.param;
    this.requestId = refusal.requestId;
    this.retryAfter = refusal.retryAfter;
  }
}

/** Status 400, 405, 413, 415 or 422. */
export class BadRequest extends ServerRefused {}
/** Status 401 or 403. */
export class Unauthorized extends ServerRefused {}
export class NotFound extends ServerRefused {}
export class Conflict extends ServerRefused {}
/** Status 429 or 503: worth trying again after `retryAfter` seconds. */
export class Overloaded extends ServerRefused {}
/** Any other status of 500 or above. */
export class ServerFailed extends ServerRefused {}

const BY_STATUS: Record<number, typeof ServerRefused> = {
  401: Unauthorized,
  403: Unauthorized,
  404: NotFound,
  409: Conflict,
  429: Overloaded,
  503: Overloaded,
};

/** The error for an answer of status 400 or above; `body` is its JSON, or undefined if it is none. */
export function refused(status: number, body: unknown, headers?: Headers): TrimtabError {
  const error = (body as { error?: { message?: unknown; code?: unknown; param?: unknown } } | undefined)?.error;
  if (typeof error?.code !== "string") {
    return new ConnectionFailed(`status ${status} in a form that a Trimtab server does not use`);
  }
  const kind = BY_STATUS[status] ?? (status >= 500 ? ServerFailed : BadRequest);
  const wait = Number(headers?.get("retry-after") ?? Number.NaN);
  return new kind(String(error.message), {
    status,
    code: error.code,
    param: typeof error.param === "string" ? error.param : null,
    requestId: headers?.get("x-request-id") ?? null,
    retryAfter: Number.isFinite(wait) ? wait : null,
  });
}
