"""Configurations, models and caches: what a state-transition model shares with its base, and what it adds."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    BASE,
    ENDS,
    FAMILIES,
    PAD,
    STARTS,
    STEPS,
    WORDS,
    base_fields,
    left_padded,
    random_chain,
    tiny_base,
    tiny_model,
)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from statecore import cache as caches
from statecore import steps
from statecore.config import LAYER_TYPE
from statecore.modeling import is_adapter_weight

START, END = STARTS[0], ENDS[0]
TOLERANCE = {"rtol": 0, "atol": 1e-10}  # float64 against float64


def chain(length: int = 24) -> torch.Tensor:
    return torch.tensor([random_chain(length, 4, 4)])


# ----------------------------------------------------------------------------------------------------------------------
# Configurations


@pytest.mark.parametrize("family", FAMILIES)
def test_config_keeps_the_defaults_of_its_family(family):
    ours, base = (model_class.config_class().to_dict() for model_class in FAMILIES[family])
    changed = {name for name in base if ours.get(name) != base[name]} - {"model_type", "layer_types"}
    assert not changed
    assert set(ours["layer_types"]) == {LAYER_TYPE}


@pytest.mark.parametrize("family", FAMILIES)
def test_config_round_trip(family, tmp_path):
    config = tiny_model(family).config
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"la_rank": 0}, "la_rank must lie in 1 .. hidden_size = 32, got 0"),
        ({"la_rank": 33}, "la_rank must lie in 1 .. hidden_size = 32, got 33"),
        ({"la_projection": "full"}, "la_projection must be one of"),
        ({"alpha_max": 1.5}, r"alpha_max must lie in 0 \.\. 1, got 1.5"),
        ({"alpha_steps": 0}, "alpha_steps and max_steps must be >= 1, got 0"),
        ({"step_end_token_ids": [51]}, "got 3 start and 1 end tokens"),
        ({"step_end_token_ids": [50, 53, 55]}, "5 different ones"),
        ({"step_end_token_ids": [-1, 53, 55]}, "must be >= 0, got -1"),
        ({"use_sliding_window": True}, "use_sliding_window must be False"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(Exception, match=message):
        FAMILIES["qwen2"][0].config_class(**(BASE | STEPS | fields))


def test_alpha_table():
    config = FAMILIES["qwen2"][0].config_class(**(BASE | STEPS | {"alpha_max": 0.4, "alpha_steps": 10, "max_steps": 7}))
    expected = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    torch.testing.assert_close(config.alpha_table(), expected)


# ----------------------------------------------------------------------------------------------------------------------
# Steps from tokens

P, S, E, T, U = -1, 0, 2, 1, 3  # ordinary token, start and end of pattern 0, start and end of pattern 1


@pytest.mark.parametrize(
    ("markers", "valid", "ids"),
    [
        ([P, P, S, P, E, T, P, U, P, P], [1] * 10, [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]),
        ([S, P, E, P, S, E], [1] * 6, [1, 1, 1, 2, 3, 3]),  # text between two steps has an id of its own
        ([P, S, P, T, P, U], [1] * 6, [0, 1, 1, 2, 2, 2]),  # a start ends an open step
        ([P, E, E, P], [1] * 4, [0, 0, 1, 2]),
        ([P, P, S, E, P, P], [0, 1, 1, 1, 1, 0], [-1, 0, 1, 1, 2, -1]),
        ([P, S, E, P, P, P], [1, 1, 1, 0, 0, 1], [0, 1, 1, -1, -1, 2]),  # a step may begin after padding
        ([P, E, P, P], [1, 0, 1, 1], [0, -1, 0, 0]),  # a padded marker is ignored
    ],
)
def test_step_ids_from_markers(markers, valid, ids):
    markers, valid = torch.tensor([markers]), torch.tensor([valid]).bool()
    assert steps.steps_from_markers(markers, 2, valid).ids.tolist() == [ids]
    for cut in range(1, markers.shape[1]):  # in two parts, with a cache
        first = steps.steps_from_markers(markers[:, :cut], 2, valid[:, :cut])
        slots = steps.make_context(first, None, torch.zeros(1), None, True, caching=True).slots
        second = steps.steps_from_markers(markers[:, cut:], 2, valid[:, cut:], slots)
        assert torch.cat([first.ids, second.ids], 1).tolist() == [ids], cut


def test_step_ids_restart_in_every_packed_sequence():
    markers = torch.tensor([[P, S, P, E, P, S, E, P, P, P]])
    valid = torch.ones_like(markers).bool()
    bounds = torch.tensor([0, 4, 7, 7, 10], dtype=torch.int32)  # the first ends with an end token; the third is empty
    ids = steps.steps_from_markers(markers, 2, valid, None, bounds).ids
    assert ids.tolist() == [[0, 1, 1, 1, 0, 1, 1, 0, 0, 0]]


def test_cu_seqlens_from_collators():
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 0]])
    assert steps.packed_cu_seqlens(None, None, position_ids, 1).tolist() == [0, 3, 5, 6]
    assert steps.packed_cu_seqlens(None, torch.tensor([[4, 4, 4, 7, 7, 9]]), None, 1).tolist() == [0, 3, 5, 6]
    assert steps.packed_cu_seqlens(None, None, torch.arange(6)[None], 1) is None
    assert steps.packed_cu_seqlens(None, None, torch.arange(6).expand(2, -1), 2) is None
    assert steps.packed_positions(torch.tensor([0, 3, 5, 6]), 6).tolist() == position_ids.tolist()
    with pytest.raises(ValueError, match="must come in one row, got a batch of 2 rows"):
        steps.packed_cu_seqlens(torch.tensor([0, 6, 12]), None, None, 2)


# ----------------------------------------------------------------------------------------------------------------------
# The base inside


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_full_attention_is_the_base_bit_for_bit(family, attention):
    model, base = tiny_model(family, torch.float32), tiny_base(family)
    base.load_state_dict(model.state_dict(), strict=False)
    model.set_attn_implementation(attention)
    base.set_attn_implementation(attention)
    # With markers among the tokens: for the teacher, step tokens are unused rows of the base's embedding.
    inputs = left_padded([random_chain(20, 4, 4), random_chain(17, 3, 2)])
    with torch.no_grad(), model.full_attention():
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)
        assert torch.equal(model(inputs["input_ids"]).logits, base(inputs["input_ids"]).logits)
        arguments = {"attention_mask": inputs["attention_mask"], "max_new_tokens": 6, "do_sample": False}
        ours, theirs = (one.generate(inputs["input_ids"], **arguments) for one in (model, base))
    assert torch.equal(ours, theirs)
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits, base(**inputs).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_model_is_its_base_with_segments(family):
    model = tiny_model(family, fresh=True)
    words, with_steps = torch.randint(2, WORDS, (2, 15)), chain()
    with torch.no_grad(), model.full_attention():
        plain = model(words).logits
    with torch.no_grad():
        ordinary = [token for token in range(BASE["vocab_size"]) if token not in STARTS + ENDS]
        torch.testing.assert_close(model(words).logits[..., ordinary], plain[..., ordinary], **TOLERANCE)
        silent = model(with_steps).logits
        model.set_linear_attention(False)
        assert torch.equal(silent, model(with_steps).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_new_weights_are_initialised_when_a_base_checkpoint_is_loaded(family, tmp_path):
    tiny_base(family).save_pretrained(tmp_path)
    model_class = FAMILIES[family][0]
    config = model_class.config_class(**base_fields(family, **STEPS))
    model, info = model_class.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert all(is_adapter_weight(name) for name in info["missing_keys"])
    for layer in model.model.layers:
        branch = layer.self_attn.la
        assert 0.5 < branch.A.std() * branch.A.shape[1] ** 0.5 < 1.5
        for start in (branch.q.B, branch.k.B, branch.v.B, branch.gate.B, branch.gate.bias):
            assert not start.any()
    rows = model.model.embed_tokens
    assert rows.step_weight.std() > 0
    assert rows.step_rows(torch.tensor([START, 5, END, ENDS[2]])).tolist() == [0, -1, 3, 5]
    alone = model_class.from_pretrained(
        tmp_path, config=model_class.config_class(**base_fields(family, **STEPS, la_projection="low_rank"))
    )
    assert alone.model.layers[0].self_attn.la.q.B.std() > 0, "without the base's q, a zero B would have no gradient"


@pytest.mark.parametrize("tied", [True, False])
def test_step_token_rows(tied):
    model = tiny_model(tie_word_embeddings=tied, fresh=True)
    embedding, head = model.model.embed_tokens, model.lm_head
    assert (head.step_weight is embedding.step_weight) == tied
    ids = torch.tensor([[3, START, 7, ENDS[1]]])
    embedded = embedding(ids)[0]
    assert torch.equal(embedded[[0, 2]], embedding.weight[ids[0, [0, 2]]])
    assert torch.equal(embedded[[1, 3]], embedding.step_weight[[0, 4]])
    hidden = torch.randn(2, 5, BASE["hidden_size"], dtype=torch.float64)
    logits = head(hidden)
    weight = head.weight.clone()
    weight[STARTS + ENDS] = head.step_weight
    torch.testing.assert_close(logits, hidden @ weight.T, **TOLERANCE)


def test_only_new_weights_have_gradients():
    model = tiny_model()
    model.freeze_base()
    ids = chain()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == is_adapter_weight(name), name


def test_a_silent_branch_has_gradients():
    model = tiny_model(fresh=True)
    model.freeze_base()
    ids = chain()
    model(ids, labels=ids).loss.backward()
    assert all(layer.self_attn.la.v.B.grad.abs().max() > 1e-6 for layer in model.model.layers)


# ----------------------------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_equal_one_by_one(family):
    model = tiny_model(family)
    model.freeze_base()
    rows = [torch.tensor([random_chain(length, 3, 3)]) for length in (15, 1, 22)]
    alone = torch.cat([model(row).logits for row in rows], 1)
    weights = torch.randn_like(alone)
    wanted = torch.autograd.grad((alone * weights).sum(), [p for p in model.parameters() if p.requires_grad])
    packed, lengths = torch.cat(rows, 1), torch.tensor([row.shape[1] for row in rows])
    bounds = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    ways = {
        "cu_seq_lens_q": bounds,
        "seq_idx": torch.arange(3).repeat_interleave(lengths)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
    }
    for name, value in ways.items():
        got = model(packed, **{name: value}).logits
        torch.testing.assert_close(got, alone, **TOLERANCE)
        gradients = torch.autograd.grad((got * weights).sum(), [p for p in model.parameters() if p.requires_grad])
        for one, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    with torch.no_grad(), model.full_attention():
        teacher = torch.cat([model(row).logits for row in rows], 1)
        for name, value in ways.items():
            torch.testing.assert_close(model(packed, **{name: value}).logits, teacher, **TOLERANCE)
    # With padding in the last sequence.
    padded = {"input_ids": F.pad(packed, (0, 3)), "attention_mask": F.pad(torch.ones_like(packed), (0, 3))}
    padded["cu_seq_lens_q"] = bounds + torch.tensor([0, 0, 0, 3], dtype=torch.int32)
    with torch.no_grad():
        torch.testing.assert_close(model(**padded).logits[:, :-3], alone, **TOLERANCE)
        with model.full_attention():
            torch.testing.assert_close(model(**padded).logits[:, :-3], teacher, **TOLERANCE)
    with pytest.raises(ValueError, match="packed sequences cannot be cached"):
        model(packed, cu_seq_lens_q=bounds, past_key_values=DynamicCache(config=model.config))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(side):
    model = tiny_model()
    rows = [random_chain(22, 4, 4), random_chain(16, 3, 3)]
    pads = [[PAD] * (22 - len(row)) for row in rows]
    ids = [pad + row if side == "left" else row + pad for row, pad in zip(rows, pads, strict=True)]
    mask = torch.tensor([[token != PAD for token in row] for row in ids])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(torch.tensor(ids), attention_mask=mask.long(), position_ids=positions).logits
        for row, got, valid in zip(rows, logits, mask, strict=True):
            torch.testing.assert_close(got[valid], model(torch.tensor([row])).logits[0], **TOLERANCE)


def test_step_ids_override_step_tokens():
    model = tiny_model()
    ids = chain()
    markers = model.model.embed_tokens.step_rows(ids)
    derived = steps.steps_from_markers(markers, 3, torch.ones_like(ids).bool()).ids
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(model(ids, step_ids=derived).logits, logits)
        assert not torch.allclose(model(ids, step_ids=torch.zeros_like(ids)).logits, logits)
        padded = torch.cat([derived[:, :-3], torch.full((1, 3), -1)], 1)
        torch.testing.assert_close(model(ids, step_ids=padded).logits[:, :-3], logits[:, :-3], **TOLERANCE)
        cache = DynamicCache(config=model.config)
        parts = [model(ids[:, a:b], step_ids=derived[:, a:b], past_key_values=cache) for a, b in ((0, 9), (9, 24))]
        torch.testing.assert_close(torch.cat([part.logits for part in parts], 1), logits, **TOLERANCE)
    with pytest.raises(ValueError, match=r"step_ids must have shape \(1, 24\), got \(1, 23\)"):
        model(ids, step_ids=derived[:, 1:])
    with pytest.warns(FutureWarning, match="segment_ids is a deprecated alias of step_ids") as warned, torch.no_grad():
        assert torch.equal(model(ids, segment_ids=derived).logits, logits)
    assert len(warned) == 1
    with pytest.raises(TypeError, match="cannot both be given"):
        model(ids, step_ids=derived, segment_ids=derived)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(1, 24 or more\), got \(1, 1, 24, 24\)"):
        model(ids, attention_mask=torch.ones(1, 1, 24, 24))


def test_embeddings_in_place_of_tokens():
    model = tiny_model()
    words = torch.randint(2, WORDS, (1, 9))
    with torch.no_grad():
        got = model(inputs_embeds=model.get_input_embeddings()(words)).logits
        torch.testing.assert_close(got, model(words).logits, **TOLERANCE)


# ----------------------------------------------------------------------------------------------------------------------
# Features of transformers


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model, ids = tiny_model().train(), chain()
    model.freeze_base()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load(family, tied, tmp_path):
    model, ids = tiny_model(family, tie_word_embeddings=tied), chain()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is type(model)
    assert (loaded.lm_head.step_weight is loaded.model.embed_tokens.step_weight) == tied
    body = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, **TOLERANCE)
        torch.testing.assert_close(body(ids).last_hidden_state, model.model(ids).last_hidden_state, **TOLERANCE)


@pytest.mark.parametrize("tied", [True, False])
def test_resizing_keeps_the_step_rows(tied):
    model, ids = tiny_model(tie_word_embeddings=tied), chain()
    model.freeze_base()
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(77, mean_resizing=False)
        after = model(ids).logits
    assert after.shape[-1] == model.config.vocab_size == 77
    torch.testing.assert_close(after[..., :60], before, **TOLERANCE)
    rows = model.model.embed_tokens.step_weight
    assert rows.requires_grad
    assert model.lm_head.step_weight.requires_grad
    assert (model.lm_head.step_weight is rows) == tied


def test_a_copy_has_its_own_switches():
    model, ids = tiny_model(), chain()
    other = copy.deepcopy(model)
    other.set_momentum(False)
    with torch.no_grad(), other.full_attention():
        assert other.lm_head.mode is other.model.embed_tokens.mode is other.mode
        assert not torch.equal(model(ids).logits, other(ids).logits)
    assert model.mode.momentum


@pytest.mark.parametrize(
    ("dtype", "state"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_states_are_at_least_float32(dtype, state):
    model = tiny_model(dtype=dtype)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        logits = model(chain(), past_key_values=cache).logits
    assert logits.dtype == cache.layers[0].keys.dtype == dtype
    assert cache.layers[0].states.dtype == state
    assert cache.layers[0].states.shape == (3, 1, 2, 8, 8)


def test_compiles_into_one_graph():
    model, ids = tiny_model(dtype=torch.float32, num_hidden_layers=1).train(), chain()
    model.freeze_base()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for one in (model, compiled):
        model.zero_grad()
        one(ids, labels=ids).loss.backward()
        gradients.append(model.model.layers[0].self_attn.la.A.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("autocast", [True, False])
def test_low_precision_with_float32_weights_to_train(autocast):
    """bfloat16 by autocast, or a bfloat16 base with a float32 adapter."""
    model, ids = tiny_model(dtype=torch.float32), chain()
    model.freeze_base()
    wanted = model(ids, labels=ids).loss
    if not autocast:
        for name, parameter in model.named_parameters():
            if not is_adapter_weight(name):
                parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert abs(loss - wanted) < 0.05
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


# ----------------------------------------------------------------------------------------------------------------------
# Caches


def filled_cache(model, inputs: dict[str, torch.Tensor]) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    return cache


def test_snapshot_restore_and_fork():
    model = tiny_model()
    inputs = left_padded([random_chain(20, 4, 4), random_chain(18, 3, 5)])
    cache = filled_cache(model, inputs)
    saved = caches.snapshot(cache)
    rows = torch.tensor([1, 0, 1])
    forked = caches.fork(cache, rows)
    follow = torch.tensor([[START, 5, 6], [7, 8, END]])

    def go_on(tokens: torch.Tensor, over: DynamicCache) -> torch.Tensor:
        with torch.no_grad():
            return model(tokens, past_key_values=over, position_ids=torch.arange(20, 23)[None]).logits

    first = go_on(follow, cache)
    assert cache.get_seq_length() == 23
    assert saved.get_seq_length() == 20
    for _ in range(2):
        caches.restore(cache, saved)
        assert torch.equal(go_on(follow, cache), first)
    torch.testing.assert_close(go_on(follow[rows], forked), first[rows], **TOLERANCE)


def test_reordering_and_repeating_rows():
    model = tiny_model()
    inputs = left_padded([random_chain(20, 4, 4), random_chain(18, 3, 5)])
    repeated, reordered = filled_cache(model, inputs), filled_cache(model, inputs)
    repeated.batch_repeat_interleave(2)
    reordered.reorder_cache(torch.tensor([0, 0, 1, 1]))
    for one, other in zip(repeated.layers, reordered.layers, strict=True):
        for name in ("keys", "values", "states"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert one.slots.ids.tolist() == other.slots.ids.tolist()
        assert one.slots.last_step.tolist() == other.slots.last_step.tolist()
    assert repeated.layers[0].states.shape[1] == 4


def test_bytes():
    model = tiny_model(dtype=torch.float32)
    cache = filled_cache(model, {"input_ids": torch.tensor([[3, 4, START, 5, 6, END, STARTS[1], 7]])})
    used = caches.cache_bytes(cache)
    token = 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes of float32
    assert used == caches.CacheBytes(kv=4 * token, state=3 * 3 * 2 * 8 * 8 * 4, peak_kv=8 * token)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert caches.cache_bytes(cache) == caches.CacheBytes(0, 0, 0)


def test_caches_refuse_what_they_cannot_do():
    model, ids = tiny_model(), chain()
    cache = filled_cache(model, {"input_ids": ids})
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        cache.crop(-1)
    with (
        pytest.raises(ValueError, match="filled with segments cannot go on with full attention"),
        model.full_attention(),
    ):
        model(ids, past_key_values=cache)
    with model.full_attention():
        full = filled_cache(model, {"input_ids": ids})
    with pytest.raises(ValueError, match="filled with full attention cannot go on with segments"):
        model(ids, past_key_values=full)
    with pytest.raises(ValueError, match=r"must be a DynamicCache\(config=model.config\)"):
        model(ids, past_key_values=DynamicCache())
    model.set_linear_attention(False)
    with pytest.raises(ValueError, match="made with the linear branch on"):
        model(ids, past_key_values=filled_cache(tiny_model(), {"input_ids": ids}))
