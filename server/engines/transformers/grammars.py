"""Grammars on the embedded engine: compiled for the model's vocabulary, and kept."""

from threading import Lock
from typing import Any

from cachetools import LRUCache
from transformers import AutoTokenizer

from server.engines.data import Sampling
from server.engines.grammar import Grammar, parsed
from server.engines.grammar_work import GrammarWork


class Grammars:
    """
    Args:
        model: folder or name of the model, for its tokenizer.
        vocab_size: columns of the logits.
        seconds: that one grammar may take.
        cache_bytes: of compiled grammars that are kept.
    """

    def __init__(self, model: str, vocab_size: int, *, seconds: float, cache_bytes: int) -> None:
        self._model, self._vocab_size = model, vocab_size
        self._work = GrammarWork(seconds, self._prepare)
        self._compiler: Any = None
        self._lock = Lock()
        self._kept: LRUCache[Grammar, Any] = LRUCache(cache_bytes, getsizeof=lambda made: made.memory_size_bytes)

    async def matcher(self, sampling: Sampling) -> Any:
        """xgrammar's matcher at the begin of a completion; None for one that is held to nothing.

        Raises:
            InvalidRequest: the grammar cannot be compiled, or takes too long to be.
        """
        if sampling.grammar is None:
            return None
        with self._lock:
            compiled = self._kept.get(sampling.grammar)
        if compiled is None:
            compiled = await self._work.done(sampling.grammar, self._compiled)
        from xgrammar import GrammarMatcher

        return GrammarMatcher(compiled, override_stop_tokens=list(sampling.stop_token_ids) or None)

    def _prepare(self) -> None:
        """In a thread, once."""
        from xgrammar import GrammarCompiler, TokenizerInfo

        info = TokenizerInfo.from_huggingface(AutoTokenizer.from_pretrained(self._model), vocab_size=self._vocab_size)
        self._compiler = GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def _compiled(self, grammar: Grammar) -> Any:
        """In a thread."""
        parts = parsed(grammar)
        try:
            made = self._compiler.compile_grammar(parts)
        except (RuntimeError, ValueError) as error:
            raise grammar.refused("it cannot be compiled for this model") from error
        with self._lock:
            if made.memory_size_bytes <= self._kept.maxsize:
                self._kept[grammar] = made
        return made
