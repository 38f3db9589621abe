"""The corpus: one skill per module, mixed with fixed shares.

Each skill module offers `SKILL`, `train_sample(rng)`, `test_items(n, seed)` and its scorer.
"""

from lab.corpus.mix import COPYING_MIX, MIX, ONE_CALL_MIX, SKILLS, TOOLS_MIX, documents
from lab.corpus.sample import Sample, TestItem

__all__ = ["COPYING_MIX", "MIX", "ONE_CALL_MIX", "SKILLS", "TOOLS_MIX", "Sample", "TestItem", "documents"]
