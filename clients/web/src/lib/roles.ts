/** Roles of keys, in the words of the server's documentation. */

import type { NewKey } from "@trimtab/client";

export type Role = NewKey["roles"][number];

export const ROLES: readonly [Role, string][] = [
  ["infer", "generate text, read receipts, look into the model"],
  ["infer_raw", "steer with numbers given in the request itself, together with infer"],
  ["library_read", "read artifacts, presets and evaluations"],
  ["library_write", "create, change and delete artifacts and presets"],
  ["jobs", "make, calibrate and evaluate artifacts, see and cancel jobs"],
  ["metrics", "read metrics, effects and the record of traffic"],
  ["operate", "default steering, kill switch, roll-outs, adapters, settings to read, housekeeping"],
  ["admin", "everything, keys included"],
];
