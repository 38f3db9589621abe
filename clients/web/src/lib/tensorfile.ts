/** The header of a file of tensors, read in the browser before anything is sent. */

export interface Header {
  format: "safetensors" | "GGUF";
  tensors: { name: string; dtype: string; shape: number[] }[];
  model: string | null;
  /** Whether the file says itself what its numbers are and where they act. */
  described: boolean;
}

const MOST_HEADER = 10_000_000;
const GGUF_TYPES: Record<number, string> = { 0: "F32", 1: "F16", 8: "Q8_0", 28: "F64", 30: "BF16" };

export async function header(file: Blob): Promise<Header> {
  const start = new DataView(await file.slice(0, 8).arrayBuffer());
  if (start.byteLength < 8) {
    throw new Error("The file is too short to hold tensors.");
  }
  // "GGUF" in ASCII.
  return start.getUint32(0) === 0x47475546 ? gguf(file) : safetensors(file, start);
}

async function safetensors(file: Blob, start: DataView): Promise<Header> {
  const length = Number(start.getBigUint64(0, true));
  if (length > Math.min(MOST_HEADER, file.size)) {
    throw new Error("The file is neither safetensors nor GGUF.");
  }
  let json: Record<string, { dtype: string; shape: number[] } & Record<string, string>>;
  try {
    json = JSON.parse(await file.slice(8, 8 + length).text()) as typeof json;
  } catch {
    throw new Error("The file is neither safetensors nor GGUF.");
  }
  const { __metadata__: more, ...tensors } = json;
  return {
    format: "safetensors",
    tensors: Object.entries(tensors).map(([name, one]) => ({ name, dtype: one.dtype, shape: one.shape })),
    model: more?.model_id ?? null,
    described: more?.trimtab !== undefined,
  };
}

/** Only what is needed to list the tensors: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md */
async function gguf(file: Blob): Promise<Header> {
  const view = new DataView(await file.slice(0, MOST_HEADER).arrayBuffer());
  let at = 8;
  const u32 = () => view.getUint32((at += 4) - 4, true);
  const u64 = () => Number(view.getBigUint64((at += 8) - 8, true));
  const text = () => {
    const length = u64();
    const bytes = new Uint8Array(view.buffer, at, length);
    at += length;
    return new TextDecoder().decode(bytes);
  };
  const SIZES: Record<number, number> = { 0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8 };
  const skip = (type: number): string | null => {
    if (type === 8) {
      return text();
    }
    if (type === 9) {
      const inner = u32();
      const count = u64();
      for (let i = 0; i < count; i += 1) {
        skip(inner);
      }
      return null;
    }
    at += SIZES[type] ?? 0;
    return null;
  };
  try {
    const tensors = u64();
    const entries = u64();
    let model: string | null = null;
    for (let i = 0; i < entries; i += 1) {
      const key = text();
      const value = skip(u32());
      if (key === "controlvector.model_hint" || key === "general.name") {
        model ??= value;
      }
    }
    const found: Header["tensors"] = [];
    for (let i = 0; i < tensors; i += 1) {
      const name = text();
      const shape = Array.from({ length: u32() }, u64);
      const type = u32();
      u64();
      found.push({ name, dtype: GGUF_TYPES[type] ?? `type ${type}`, shape });
    }
    return { format: "GGUF", tensors: found, model, described: true };
  } catch {
    throw new Error("The file says it is GGUF, and its header cannot be read.");
  }
}
