"""A GGUF file as a folder in Hugging Face form, in plain numbers, as far as transformers reads GGUF.

Runs in a process of its own (`python -m server.checkpoints.convert GGUF FOLDER`): what it takes in memory goes back to
the system with it, and what libraries print ends with it. The answer is the exit status; a refusal is one line of JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from server.checkpoints.apart import REFUSED
from steering.language.errors import UnsupportedModel
from steering.models.blocks import family_named

# What transformers raises on files that it cannot read.
UNREADABLE = (ValueError, KeyError, NotImplementedError, TypeError, AttributeError, RuntimeError, OSError)
SHARD_SIZE = "4GB"
# By the number format of most of the weights. Quantised ones are unpacked into the format that models are trained in.
_PLAIN = {"F32": torch.float32, "F16": torch.float16}


def convert(source: Path, folder: Path) -> None:
    """Write the model, its tokenizer and its chat template into `folder`.

    transformers can read a model out of GGUF but not save it, so the weights are put into a fresh one.

    Raises:
        UnsupportedModel: the family is not known to Trimtab.
        UNREADABLE: transformers cannot read it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    given: dict[str, Any] = {"gguf_file": source.name}
    config: Any = AutoConfig.from_pretrained(source.parent, **given)
    family_named(config.model_type)
    if (width := head_width(source)) is not None and hasattr(config, "head_dim"):
        # transformers reads this for some families only, and takes the family's usual width for the others.
        config.head_dim = width
    tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, **given)
    dtype = stored_dtype(source)
    read: Any = AutoModelForCausalLM.from_pretrained(source.parent, config=config, dtype=dtype,
                                                     quantization_config=GgufConfig(dequantize=True), **given)
    plain = type(config).from_dict({name: value for name, value in config.to_dict().items()
                                    if name not in ("quantization_config", "_name_or_path", "_model_name_or_path")})
    with torch.device("meta"):
        fresh: Any = AutoModelForCausalLM.from_config(plain, dtype=dtype)
    fresh.load_state_dict(read.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = read.generation_config
    fresh.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(folder)


def stored_dtype(source: Path) -> torch.dtype:
    """The number format to write: that of the matrices in the file, or bfloat16 where they are quantised."""
    from gguf import GGUFReader

    kinds = [tensor.tensor_type.name for tensor in GGUFReader(source).tensors if len(tensor.shape) > 1]
    return _PLAIN.get(max(set(kinds), key=kinds.count), torch.bfloat16) if kinds else torch.float32


def head_width(source: Path) -> int | None:
    """The width of an attention head that the file states; None where it states none, or another one for values."""
    from gguf import GGUFReader

    fields = GGUFReader(source).fields
    architecture = fields["general.architecture"].contents()
    said = {int(fields[name].contents()) for part in ("key", "value")
            if (name := f"{architecture}.attention.{part}_length") in fields}
    return said.pop() if len(said) == 1 else None


def main() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except UnsupportedModel as error:
        print(json.dumps(error.message))
        sys.exit(REFUSED)
    except UNREADABLE as error:
        print(json.dumps(f"transformers cannot read it ({' '.join(str(error).split())[:300]})"))
        sys.exit(REFUSED)


if __name__ == "__main__":
    main()
