export { Client, steeringField } from "./client.js";
export type { CaptureFields, ChatFields, CompletionFields, FeaturesFields, LensFields, WaitOptions } from "./client.js";
export {
  BadRequest,
  Conflict,
  ConnectionFailed,
  JobFailed,
  NotFound,
  Overloaded,
  ServerFailed,
  ServerRefused,
  TrimtabError,
  Unauthorized,
} from "./errors.js";
export type { CallOptions, ClientOptions } from "./transport.js";
export type * from "./types.js";
