"""Both models in vLLM on the CPU write the same greedy text as plain transformers, fp32 both.

Trimtab's plugin is loaded and must leave an engine alone that Trimtab did not start.
"""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoTokenizer

from lab import MODEL_NAMES, model_path
from lab.corpus import SKILLS
from lab.models import load_model

NEW_TOKENS = 24

# vLLM keeps its engine for the life of a process, so each model gets a process of its own.
ENGINE = textwrap.dedent("""
    import json, sys
    from vllm import LLM, SamplingParams

    folder, prompts, new_tokens = sys.argv[1], json.load(sys.stdin), int(sys.argv[2])
    llm = LLM(model=folder, dtype="float32", max_model_len=256, max_num_seqs=8, block_size=32,
              enforce_eager=True)
    out = llm.generate([{"prompt_token_ids": p} for p in prompts],
                       SamplingParams(temperature=0, max_tokens=new_tokens), use_tqdm=False)
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.worker.gpu_worker import Worker

    # Trimtab's plugin is installed here, and this engine was not started by Trimtab.
    assert "server.engines.vllm.plugin" in sys.modules, "vLLM did not load the plugin"
    wrapped = [Worker.load_model, *(m.generate_block_hash_extra_keys for m in (kv_cache_utils, block_pool))]
    assert all(f.__module__.startswith("vllm.") and not hasattr(f, "trimtab") for f in wrapped)
    assert not [name for name in dir(Worker) if name.startswith("trimtab")]
    assert "server.engines.vllm.worker" not in sys.modules
    print("RESULT" + json.dumps([list(o.outputs[0].token_ids) for o in out]))
""")


def prompts_of(tok) -> list[list[int]]:
    """Two held-out prompts of every skill, as token ids."""
    return [tok.encode(item.prompt) for m in SKILLS.values() for item in m.test_items(300)[:2]]


def in_vllm(folder, prompts: list[list[int]]) -> list[list[int]]:
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
           "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run([sys.executable, "-c", ENGINE, str(folder), str(NEW_TOKENS)], env=env,
                          input=json.dumps(prompts), capture_output=True, text=True, check=False)
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert results, done.stderr[-3000:]
    return json.loads(results[0].removeprefix("RESULT"))


@torch.inference_mode()
def in_transformers(folder, prompts: list[list[int]]) -> list[list[int]]:
    model = load_model(folder)
    out = []
    for ids in prompts:
        done = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(),
                              max_new_tokens=NEW_TOKENS, do_sample=False)
        out.append(done[0, len(ids):].tolist())
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_same_greedy_tokens_in_vllm_and_transformers(name):
    folder = model_path(name)
    prompts = prompts_of(AutoTokenizer.from_pretrained(folder))
    assert in_vllm(folder, prompts) == in_transformers(folder, prompts)
