"""All rows, in the order of the page."""

from __future__ import annotations

from lab.replications import (
    aligned_concepts,
    angular_steering,
    attention_heads,
    conditional_gates,
    entropic_steering,
    function_vectors,
    manifold_steering,
    native_skills,
    not_normal,
    porting,
    refusal_direction,
    relation_neurons,
    sae_features,
    sign_patterns,
    snmf_features,
    sparsification,
    stacks,
    tunable_experts,
    tuned_lens,
)
from lab.replications.common import Row

ROWS: tuple[Row, ...] = (
    function_vectors.ROW, tunable_experts.ROW, sign_patterns.ROW, manifold_steering.ROW, entropic_steering.ROW,
    native_skills.ROW, relation_neurons.ROW, attention_heads.ROW, aligned_concepts.ROW, refusal_direction.ROW,
    angular_steering.ROW, conditional_gates.ROW, tuned_lens.ROW,
    not_normal.ROW, stacks.ROW, porting.ROW, sae_features.ROW, sparsification.ROW, snmf_features.ROW,
)
