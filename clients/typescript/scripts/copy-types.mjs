// tsc leaves declaration files where they are; the published types need the generated ones beside them.
import { copyFileSync } from "node:fs";

for (const name of ["answers.d.ts", "requests.d.ts"]) {
  copyFileSync(new URL(`../src/${name}`, import.meta.url), new URL(`../dist/${name}`, import.meta.url));
}
