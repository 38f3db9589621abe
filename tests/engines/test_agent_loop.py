"""An agent's loop on the model that calls tools, steered and streamed. The scope decides whether its calls are right.
"""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI
from transformers import AutoTokenizer

from lab import TOOLS_MODEL, model_path
from server.app import create_app
from server.engines.transformers.engine import TransformersEngine
from server.engines.transformers.options import EngineOptions
from server.settings import Settings
from server.text.vocabulary import Vocabulary
from tests.agents import check_that_the_scope_decides
from vectors.library import Library


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[AsyncOpenAI]:
    folder = str(model_path(TOOLS_MODEL))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = TransformersEngine(EngineOptions(model=folder, model_id=TOOLS_MODEL, self_test=False,
                                              kv_cache_tokens=16384, max_batch_tokens=512))
    library = Library.open(f"sqlite:///{tmp_path / 'library.db'}", str(tmp_path / "blobs"))
    vocabulary = Vocabulary(tokenizer, [tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer.eos_token_id],
                            engine.facts.vocab_size)
    app = create_app(Settings(served_model_name=TOOLS_MODEL, data_dir=tmp_path / "data", shadow_sample=0), engine,
                     library, vocabulary)
    async with app.router.lifespan_context(app), httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://localhost", timeout=120) as client:
        yield AsyncOpenAI(api_key="none", base_url="http://localhost/v1", http_client=client, max_retries=0)


async def test_a_persona_leaves_calls_alone_where_its_scope_says_so(api: AsyncOpenAI) -> None:
    await check_that_the_scope_decides(api, 3)
