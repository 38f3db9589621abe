"""Sites of every family against independent readings of the same forward pass."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from steering.acting.selftest import run_selftest
from steering.language.errors import LayerOutOfRange, UnsupportedModel, UnsupportedSite
from steering.language.vocabulary import SITES, Site
from steering.models import fingerprints
from steering.models.describe import model_facts
from steering.models.facts import ModelFacts
from steering.models.families import FAMILIES as KNOWN
from steering.models.families import Family
from steering.models.fingerprints import fingerprint
from steering.models.taps import attach, tap
from tests.tiny import FAMILIES, MOE_FAMILIES, VOCAB_SIZE, tiny

torch.set_num_threads(1)

BATCH, LENGTH = 2, 11
POST_NORM = ("gemma2", "gemma3_text", "olmo2")
DENSE_LAYERS = {"qwen2_moe": (0,), "qwen3_moe": (1,), "deepseek_v2": (0,), "deepseek_v3": (0,), "mixtral": (),
                "olmoe": ()}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param)


@pytest.fixture
def facts(model: PreTrainedModel) -> ModelFacts:
    return model_facts(model, model_id="tiny", fingerprint="0" * 64)


def token_ids(seed: int = 1, shape: tuple[int, int] = (BATCH, LENGTH)) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model: PreTrainedModel, facts: ModelFacts, ids: Tensor) -> dict[tuple[Site, int], Tensor]:
    """Every offered activation of one forward pass, `[num_tokens, width]`."""
    seen: dict[tuple[Site, int], Tensor] = {}

    def reader(site: Site, layer: int) -> Callable[[Tensor], Tensor]:
        def edit(x: Tensor) -> Tensor:
            assert (site, layer) not in seen, "the site was passed twice in one forward"
            seen[site, layer] = x.clone()
            return x
        return edit

    handles = [attach(model, site, layer, reader(site, layer)) for site, layers in facts.sites.items()
               for layer in layers]
    try:
        model(ids)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids).logits


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def projection(layer: nn.Module, x: Tensor) -> Tensor:
    """x times the layer's weight plus its bias, Conv1D keeping its weight the other way round."""
    weight = layer.weight if type(layer).__name__ == "Conv1D" else layer.weight.T
    bias = getattr(layer, "bias", None)
    return x @ weight + (bias if bias is not None else 0.0)


def post_norms(model: PreTrainedModel, layer: int) -> tuple[nn.Module, nn.Module]:
    if model.config.model_type not in POST_NORM:
        return nn.Identity(), nn.Identity()
    block = model.model.layers[layer]
    return block.post_attention_layernorm, block.post_feedforward_layernorm


def test_a_family_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that nothing else knows of: its tiny model and its sites follow from the entry alone."""
    with pytest.raises(UnsupportedModel, match="'starcoder2' is not known"):
        model_facts(tiny("starcoder2"), model_id="tiny", fingerprint="")
    monkeypatch.setitem(KNOWN, "starcoder2", Family("starcoder2", mlp_act="mlp.c_proj"))
    added = tiny("starcoder2")
    facts = model_facts(added, model_id="tiny", fingerprint="")
    test_widths_are_those_of_the_activations(added, facts)
    test_residual_stream_equals_hidden_states(added, facts)
    found = run_selftest(added, facts)
    assert found.missed == () and set(found.reached) == set(SITES) - {"router"}


def test_facts(model: PreTrainedModel, facts: ModelFacts) -> None:
    family = model.config.model_type
    layers = (0, 1, 2)
    assert (facts.family, facts.num_layers, facts.d_model, facts.num_heads, facts.d_ff) == (family, 3, 32, 4, 56)
    assert (facts.vocab_size, facts.context_length) == (VOCAB_SIZE, 512)
    dense = DENSE_LAYERS.get(family, layers)
    expected = {site: layers for site in ("resid_pre", "resid_post", "attn_out", "mlp_out", "head_out")}
    if dense:
        expected["mlp_act"] = dense
    if family in MOE_FAMILIES:
        expected["router"] = tuple(n for n in layers if n not in dense)
    assert facts.sites == expected
    experts = {"mixtral": (6, 2), "qwen2_moe": (6, 3), "qwen3_moe": (8, 2), "olmoe": (8, 3), "deepseek_v2": (8, 3),
               "deepseek_v3": (8, 3)}
    assert (facts.num_experts, facts.experts_per_token) == experts.get(family, (0, 0))


def test_widths_are_those_of_the_activations(model: PreTrainedModel, facts: ModelFacts) -> None:
    for (site, _), x in read(model, facts, token_ids()).items():
        assert x.shape == (BATCH * LENGTH, facts.width(site)), site


def test_residual_stream_equals_hidden_states(model: PreTrainedModel, facts: ModelFacts) -> None:
    ids = token_ids()
    seen = read(model, facts, ids)
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
    for layer in range(facts.num_layers):
        assert torch.equal(seen["resid_pre", layer], hidden[layer].flatten(0, 1))
        if layer < facts.num_layers - 1:
            assert torch.equal(seen["resid_post", layer], hidden[layer + 1].flatten(0, 1))
            assert torch.equal(seen["resid_post", layer], seen["resid_pre", layer + 1])


@torch.no_grad()
def test_first_input_is_the_embeddings_as_fed(model: PreTrainedModel, facts: ModelFacts) -> None:
    ids = token_ids()
    embedded = model.get_input_embeddings()(ids)
    if model.config.model_type == "gpt2":
        embedded = embedded + model.transformer.wpe(torch.arange(LENGTH))
    close(read(model, facts, ids)["resid_pre", 0], embedded.flatten(0, 1))


@torch.no_grad()
def test_last_output_gives_the_logits(model: PreTrainedModel, facts: ModelFacts) -> None:
    ids = token_ids()
    base = model.base_model
    norm = next(getattr(base, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(base, name))
    out = model.get_output_embeddings()(norm(read(model, facts, ids)["resid_post", facts.num_layers - 1]))
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:
        out = torch.tanh(out / cap) * cap
    close(out, logits(model, ids).flatten(0, 1))


def test_contributions_add_up(model: PreTrainedModel, facts: ModelFacts) -> None:
    seen = read(model, facts, token_ids())
    for n in range(facts.num_layers):
        close(seen["resid_pre", n] + seen["attn_out", n] + seen["mlp_out", n], seen["resid_post", n])


@pytest.mark.parametrize("parallel", [True, False])
def test_contributions_add_up_in_both_forms_of_neox(parallel: bool) -> None:
    model = tiny("gpt_neox", use_parallel_residual=parallel)
    ids = token_ids()
    seen = read(model, model_facts(model, model_id="tiny", fingerprint=""), ids)
    block = model.gpt_neox.layers[1]
    with torch.no_grad():
        middle = seen["resid_pre", 1] if parallel else seen["resid_pre", 1] + seen["attn_out", 1]
        close(block.mlp(block.post_attention_layernorm(middle)), seen["mlp_out", 1])
    close(seen["resid_pre", 1] + seen["attn_out", 1] + seen["mlp_out", 1], seen["resid_post", 1])


@torch.no_grad()
def test_heads_and_neurons_project_to_the_contributions(model: PreTrainedModel, facts: ModelFacts) -> None:
    seen = read(model, facts, token_ids())
    for n in facts.sites["head_out"]:
        after = projection(tap(model, "head_out", n).module, seen["head_out", n])
        close(post_norms(model, n)[0](after), seen["attn_out", n])
    for n in facts.sites.get("mlp_act", ()):
        after = projection(tap(model, "mlp_act", n).module, seen["mlp_act", n])
        close(post_norms(model, n)[1](after), seen["mlp_out", n])


@torch.no_grad()
def test_one_head_of_head_out_is_one_head_of_attention(model: PreTrainedModel, facts: ModelFacts) -> None:
    """The first token attends only to itself, so its head_out is the values it made itself, head by head."""
    family = model.config.model_type
    seen = read(model, facts, token_ids())
    block = model.base_model.h[1] if family == "gpt2" else model.base_model.layers[1]
    norm = getattr(block, "input_layernorm", None) or getattr(block, "ln_1", None)
    x = seen["resid_pre", 1][0]
    x = norm(x) if norm is not None else x
    heads, width = facts.num_heads, facts.head_dim
    if family == "gpt2":
        values = block.attn.c_attn(x[None])[0].chunk(3)[2].view(heads, width)
    elif family == "gpt_neox":
        values = block.attention.query_key_value(x).view(heads, 3 * width)[:, 2 * width:]
    elif family == "phi3":
        values = block.self_attn.qkv_proj(x)[-2 * width:].view(2, width).repeat_interleave(2, dim=0)
    elif family.startswith("deepseek"):
        attention = block.self_attn
        latent = attention.kv_a_layernorm(attention.kv_a_proj_with_mqa(x)[:attention.kv_lora_rank])
        values = attention.kv_b_proj(latent).view(heads, -1)[:, attention.qk_nope_head_dim:]
    else:
        groups = model.config.num_key_value_heads
        values = block.self_attn.v_proj(x).view(groups, width).repeat_interleave(heads // groups, dim=0)
    close(seen["head_out", 1][0].view(heads, width), values)


def test_an_edit_moves_the_logits_and_no_edit_leaves_them(model: PreTrainedModel, facts: ModelFacts) -> None:
    ids = token_ids()
    untouched = logits(model, ids)
    for site, layers in facts.sites.items():
        noise = torch.randn(facts.width(site), generator=torch.Generator().manual_seed(3))
        for layer in layers:
            handle = attach(model, site, layer, lambda x: x)
            assert torch.equal(logits(model, ids), untouched), (site, layer)
            handle.remove()
            handle = attach(model, site, layer, lambda x, noise=noise: x + noise)
            moved = (logits(model, ids) - untouched).abs().amax(dim=-1)
            handle.remove()
            assert float(moved.min()) > 1e-4, (site, layer, "some token was not reached")
    assert torch.equal(logits(model, ids), untouched), "a handle left something behind"


def test_an_edit_of_one_token_leaves_what_comes_before(model: PreTrainedModel, facts: ModelFacts) -> None:
    ids = token_ids(shape=(1, LENGTH))
    untouched = logits(model, ids)[0]

    def edit(x: Tensor) -> Tensor:
        edited = x.clone()
        edited[6] = edited[6] + 1.0 + torch.arange(x.shape[-1])
        return edited

    for site, layers in facts.sites.items():
        handle = attach(model, site, layers[-1], edit)
        steered = logits(model, ids)[0]
        handle.remove()
        close(steered[:6], untouched[:6])
        assert float((steered[6] - untouched[6]).abs().max()) > 1e-4, site


def test_a_replaced_stream_is_what_the_next_block_sees(model: PreTrainedModel, facts: ModelFacts) -> None:
    ids = token_ids()
    replacement = torch.randn(BATCH * LENGTH, facts.d_model, generator=torch.Generator().manual_seed(5))
    by_output = attach(model, "resid_post", 0, lambda x: replacement)
    first = logits(model, ids)
    by_output.remove()
    by_input = attach(model, "resid_pre", 1, lambda x: replacement)
    second = logits(model, ids)
    by_input.remove()
    assert torch.equal(first, second)


def test_flat_batch_cached_and_whole_agree_under_edits(model: PreTrainedModel, facts: ModelFacts) -> None:
    ids = token_ids(shape=(1, LENGTH))
    handles = [attach(model, site, layers[0], lambda x: x * 1.25 + 0.05) for site, layers in facts.sites.items()]
    try:
        whole = logits(model, ids)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            prefill = model(ids[:, :7], past_key_values=cache, use_cache=True).logits
            steps = [model(ids[:, n:n + 1], past_key_values=cache, use_cache=True).logits for n in range(7, LENGTH)]
        close(torch.cat([prefill, *steps], dim=1), whole)
    finally:
        for handle in handles:
            handle.remove()


def test_edits_stay_in_the_models_dtype(model: PreTrainedModel, facts: ModelFacts) -> None:
    half = tiny(model.config.model_type).to(torch.bfloat16)
    for site, layers in facts.sites.items():
        handle = attach(half, site, layers[0], lambda x: x.float() * 1.5)
        assert logits(half, token_ids()).dtype == torch.bfloat16, site
        handle.remove()


def test_block_input_by_name_is_reached(model: PreTrainedModel, facts: ModelFacts) -> None:
    block = tap(model, "resid_pre", 0).module
    seen: list[Tensor] = []

    def edit(x: Tensor) -> Tensor:
        seen.append(x)
        return x + 1.0

    handle = attach(model, "resid_pre", 0, edit)
    block.forward = lambda hidden_states: hidden_states
    x = torch.randn(1, 4, facts.d_model)
    try:
        by_name, by_position = block(hidden_states=x), block(x)
    finally:
        del block.forward
        handle.remove()
    assert torch.equal(by_name, x + 1.0) and torch.equal(by_position, x + 1.0)
    assert [list(part.shape) for part in seen] == [[4, facts.d_model]] * 2


def test_unknown_family_is_refused_by_name() -> None:
    config = AutoConfig.for_model("opt", vocab_size=32, hidden_size=16, ffn_dim=16, num_hidden_layers=1,
                                  num_attention_heads=2, word_embed_proj_dim=16, max_position_embeddings=16)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModel, match="'opt'") as caught:
        model_facts(model, model_id="x", fingerprint="")
    assert all(family in str(caught.value) for family in FAMILIES)
    with pytest.raises(UnsupportedModel):
        tap(model, "resid_post", 0)


def test_what_a_layer_lacks_is_refused(model: PreTrainedModel, facts: ModelFacts) -> None:
    for site in SITES:
        for layer in set(range(facts.num_layers)) - set(facts.sites.get(site, ())):
            with pytest.raises(UnsupportedSite, match=site):
                tap(model, site, layer)
            with pytest.raises(UnsupportedSite, match=site):
                attach(model, site, layer, lambda x: x)
    for layer in (-1, facts.num_layers):
        with pytest.raises(LayerOutOfRange):
            tap(model, "resid_post", layer)


def test_fingerprint_knows_weights_and_only_them(model: PreTrainedModel) -> None:
    family = model.config.model_type
    mark = fingerprint(model)
    assert len(mark) == 64 and mark == fingerprint(tiny(family))
    assert mark != fingerprint(tiny(family, seed=1))
    changed = tiny(family)
    with torch.no_grad():
        list(changed.parameters())[-1].view(-1)[-1] += 0.1
    assert mark != fingerprint(changed)


def test_fingerprint_does_not_depend_on_the_dtype_it_was_loaded_in(model: PreTrainedModel) -> None:
    """One checkpoint in float32 on the CPU and in bfloat16 on a GPU must take the same artifacts."""
    assert fingerprint(model) == fingerprint(tiny(model.config.model_type).to(torch.bfloat16))


def test_fingerprint_of_a_large_model_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fingerprint(tiny("llama"))
    monkeypatch.setattr(fingerprints, "FULL_HASH_LIMIT_NUMBERS", 0)
    monkeypatch.setattr(fingerprints, "SAMPLE_CHUNK_NUMBERS", 8)
    model = tiny("llama")
    mark = fingerprint(model)
    assert mark != whole and mark == fingerprint(tiny("llama")) and mark != fingerprint(tiny("llama", seed=1))
    weight = model.lm_head.weight.data.view(-1)
    for index in (0, -1):
        before = weight[index].item()
        weight[index] = before + 1.0
        assert fingerprint(model) != mark
        weight[index] = before
    assert fingerprint(model) == mark
