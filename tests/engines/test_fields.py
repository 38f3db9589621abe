"""Fields that change which token is chosen, on the embedded engine (`field_cases`)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from tests.engines import reference as ref
from tests.engines.cases import vector
from tests.engines.conftest import compiled
from tests.engines.field_cases import fields_choose_as_a_greedy_loop


async def test_fields_choose_as_a_greedy_loop(start_engine: Any, model_dir: Callable[[str], Path]) -> None:
    engine = await start_engine("qwen3", page_size=8)
    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"), dtype="float32").eval()
    push = vector(3, 32, 2.0)
    program = compiled(engine, {"op": "add", "layers": [1], "inline": {"vector": push.tolist()}})
    prompts = [[5 + n, 17, 29 + 2 * n, 41, 53, 8] for n in range(20)]
    await fields_choose_as_a_greedy_loop(engine, model, prompts, program,
                                         [ref.Edit("resid_post", 1, ref.add(push), ref.everywhere)])
