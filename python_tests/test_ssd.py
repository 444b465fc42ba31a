"""SSD models: the scan against its recurrence, models against transformers' Mamba2, full passes against decoding,
hybrids, and the curriculum.
"""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from cases import EXACT, relative_error
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba2 import modeling_mamba2

from statecore import cache as caches
from statecore.ssd import SSDCacheLayer, SSDConfig, SSDForCausalLM, SSDMixer, evaluation, ssd_scan, ssd_step, ssm_states
from statecore.ssd.model import Packing
from statecore.ssd.recipe import Source, parse_recipe, read_recipe
from statecore.ssd.rows import Row, passes, programs, rows_of
from statecore.ssd.train import Curriculum, SkipNonFinite, run_recipe, ssd

PAD, EOS = 0, 1
SMALL = {
    "hidden_size": 24,
    "expand": 2,
    "num_heads": 6,
    "head_dim": 8,
    "state_size": 10,
    "n_groups": 2,
    "num_hidden_layers": 2,
    "vocab_size": 40,
    "chunk_size": 8,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "la_rank": 6, "initializer_range": 0.2}
STEP_TOKENS = {"step_start_token_ids": [30, 32], "step_end_token_ids": [31, 33]}
HYBRIDS = {
    "attention": {"layer_list": ["ssd", "attention", "ssd"], "attention": ATTENTION},
    "mixed": {"layer_list": ["mixed_attention", "ssd", "mixed_attention"], "attention": ATTENTION | STEP_TOKENS},
    "all": {"layer_list": ["attention", "ssd", "mixed_attention"], "attention": ATTENTION | STEP_TOKENS},
}
# Every field that changes a formula; a full product would add no coverage.
GRID = {
    "one group": {"n_groups": 1},
    "groups": {"n_groups": 2, "num_heads": 6},
    "one group per head": {"n_groups": 6},
    "biases": {"use_bias": True, "use_conv_bias": False},
    "short convolution": {"conv_kernel": 2},
    "wide state, tied": {"state_size": 33, "tie_word_embeddings": True},
    "dt limits": {"time_step_limit": (0.02, 0.4)},
    "gelu, plain residual": {"hidden_act": "gelu", "residual_in_fp32": False},
    "no expansion": {"expand": 1, "num_heads": 3, "n_groups": 3, "head_dim": 8},
}


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Makes every parameter random: zeros and ones would hide errors."""
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "norm_f.weight", ".D")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("A_log"):
            torch.nn.init.uniform_(parameter, -1, 1.5)
        elif name.endswith((".bias", "dt_bias")):
            torch.nn.init.normal_(parameter, std=0.5)
        elif ".la." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def small_model(dtype: torch.dtype = torch.float64, **fields) -> SSDForCausalLM:
    fields = {"num_hidden_layers": len(fields.get("layer_list") or [0, 0])} | fields
    return randomise(SSDForCausalLM(SSDConfig(**(SMALL | fields)))).to(dtype)


def ours_and_theirs(dtype: torch.dtype, **fields) -> tuple[SSDForCausalLM, Mamba2ForCausalLM]:
    theirs = randomise(Mamba2ForCausalLM(Mamba2Config(**(SMALL | fields)))).to(dtype)
    ours = SSDForCausalLM(SSDConfig.from_mamba2(theirs.config)).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def tokens(batch: int, time: int) -> torch.Tensor:
    return torch.randint(2, 30, (batch, time))


def chain(time: int) -> torch.Tensor:
    """Ordinary tokens and step tokens."""
    ids = tokens(1, time)
    ids[0, 5::9], ids[0, 11::9] = 30, 31
    return ids


def in_pieces(model: SSDForCausalLM, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    cache, out = DynamicCache(config=model.config), []
    for piece in ids.split(lengths, 1):
        out.append(model(piece, past_key_values=cache, use_cache=True).logits)
    return torch.cat(out, 1)


class Float64Torch:
    """The torch module for transformers' Mamba2, whose code converts to float32 in many places whatever the model's
    dtype. With float64 in their place its formulas can be compared exactly.
    """

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def in_float64(monkeypatch):
    monkeypatch.setattr(modeling_mamba2, "torch", Float64Torch())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


# ----------------------------------------------------------------------------------------------------------------------
# Scan


def scan_case(batch=2, time=23, heads=6, groups=2, width=5, size=7):
    x = torch.randn(batch, time, heads, width, dtype=torch.float64)
    dt = torch.rand(batch, time, heads, dtype=torch.float64) * 2
    A = -torch.rand(heads, dtype=torch.float64) * 3
    B, C = torch.randn(2, batch, time, groups, size, dtype=torch.float64)
    return x, dt, A, B, C, torch.randn(batch, heads, size, width, dtype=torch.float64)


def recurrence(x, dt, A, B, C, state):
    """The paper's formulas token by token, with its states [.., head_dim, state_size]."""
    heads = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(heads, 2), C.repeat_interleave(heads, 2)
    h, out = state.mT, []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t] * A)[..., None, None] * h
        h = h + (dt[:, t, :, None] * x[:, t])[..., :, None] * B[:, t, :, None, :]
        out.append((h @ C[:, t, :, :, None])[..., 0])
    return torch.stack(out, 1), h.mT


@pytest.mark.parametrize("time", [1, 2, 64, 70])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_scan_equals_recurrence(time, groups):
    case = scan_case(time=time, groups=groups)
    for got, wanted in zip(ssd_scan(*case), recurrence(*case), strict=True):
        assert relative_error(got, wanted) < EXACT


def test_decoding_continues_a_scan_at_any_token():
    *case, state = scan_case()
    whole, final = ssd_scan(*case, state)
    A = case.pop(2)
    for split in (0, 1, 9, 22):
        x, dt, B, C = (part[:, :split] for part in case)
        out, running = ssd_scan(x, dt, A, B, C, state)
        outs = [out]
        for t in range(split, whole.shape[1]):
            x, dt, B, C = (part[:, t : t + 1] for part in case)
            outs.append(ssd_step(x, dt, A, B, C, running))
        assert relative_error(torch.cat(outs, 1), whole) < EXACT
        assert relative_error(running, final) < EXACT


def test_scan_without_decay_is_linear_attention_without_feature_map():
    x, dt, _, B, C, _ = scan_case(groups=6)
    out, state = ssd_scan(x, torch.ones_like(dt), torch.zeros(6, dtype=torch.float64), B, C)
    scores = torch.einsum("bihn,bjhn->bhij", C, B).tril()
    assert relative_error(out, torch.einsum("bhij,bjhp->bihp", scores, x)) < EXACT
    assert relative_error(state, torch.einsum("bjhn,bjhp->bhnp", B, x)) < EXACT


# ----------------------------------------------------------------------------------------------------------------------
# Against transformers


@pytest.mark.parametrize("name", GRID)
@torch.no_grad()
def test_float64_logits_equal_transformers(name, in_float64):
    ours, theirs = ours_and_theirs(torch.float64, **GRID[name])
    ids = tokens(2, 29)
    wanted = theirs(ids).logits
    assert wanted.dtype == torch.float64
    assert wanted.std() > 0.3
    close = {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(ours(ids).logits, wanted, **close)
    torch.testing.assert_close(in_pieces(ours, ids, [3, 1, 1, 8, 2, 14]), wanted, **close)
    torch.testing.assert_close(in_pieces(ours, ids, [7] + [1] * 22), wanted, **close)
    torch.testing.assert_close(in_pieces(ours, ids, [1] * 29), wanted, **close)
    if name != "dt limits":  # transformers does not apply them in decoding
        cache = DynamicCache(config=theirs.config)
        decoded = [theirs(piece, cache_params=cache, use_cache=True).logits for piece in ids.split([7] + [1] * 22, 1)]
        torch.testing.assert_close(torch.cat(decoded, 1), wanted, **close)


@pytest.mark.parametrize("name", GRID)
@torch.no_grad()
def test_float32_logits_equal_transformers(name):
    ours, theirs = ours_and_theirs(torch.float32, **GRID[name])
    ids = tokens(2, 50)
    wanted = theirs(ids).logits
    for got in (ours(ids).logits, in_pieces(ours, ids, [20, 13] + [1] * 17)):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_gradients_equal_transformers(in_float64):
    ours, theirs = ours_and_theirs(torch.float64)
    ids = tokens(2, 21)
    for model in (ours, theirs):
        model(ids, labels=ids, use_cache=False).loss.backward()
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, wanted[name].grad) < 1e-9, name


@torch.no_grad()
def test_bfloat16_is_as_close_as_transformers():
    exact, _ = ours_and_theirs(torch.float32, num_hidden_layers=2)
    ids = tokens(2, 60)
    wanted = exact(ids).logits
    low = copy.deepcopy(exact).to(torch.bfloat16)
    theirs = Mamba2ForCausalLM(Mamba2Config(**SMALL)).eval()
    theirs.load_state_dict(exact.state_dict())
    error = relative_error(low(ids).logits, wanted)
    assert error < 1.5 * relative_error(theirs.to(torch.bfloat16)(ids).logits, wanted) + 2e-3


def test_autocast_trains_float32_weights_in_bfloat16():
    model, ids = small_model(torch.float32), chain(40)
    wanted = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert outputs.loss.item() == pytest.approx(wanted.item(), rel=0.02)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_checkpoints_load_in_both_directions(tmp_path):
    ours, theirs = ours_and_theirs(torch.float32)
    ids = tokens(1, 12)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded, report = SSDForCausalLM.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(loaded(ids).logits, ours(ids).logits, rtol=0, atol=0)
    loaded.save_pretrained(tmp_path / "ours")
    fields = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert fields == json.loads((tmp_path / "theirs" / "config.json").read_text())
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(back) is Mamba2ForCausalLM
    torch.testing.assert_close(back(ids).logits, theirs(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", [*HYBRIDS, "norm groups"])
@torch.no_grad()
def test_models_beyond_mamba2_keep_their_own_type(name, tmp_path):
    model = small_model(torch.float32, **(HYBRIDS.get(name) or {"norm_groups": 2}))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is SSDForCausalLM
    assert loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict()
    ids = chain(20)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)


@torch.no_grad()
def test_new_weights_are_initialised_as_in_the_reference():
    torch.manual_seed(1)
    mixer = SSDForCausalLM(SSDConfig(**(SMALL | {"num_heads": 384, "head_dim": 2, "hidden_size": 384}))).backbone
    mixer = mixer.layers[1].mixer
    assert 1 <= mixer.A_log.exp().min() < 1.5
    assert 15.5 < mixer.A_log.exp().max() <= 16
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert 0.00099 < dt.min() < 0.0015
    assert 0.08 < dt.max() < 0.1001
    assert (mixer.D == 1).all()
    assert (mixer.norm.weight == 1).all()


@torch.no_grad()
def test_norm_groups():
    norm = SSDMixer(SSDConfig(**(SMALL | {"norm_groups": 2}))).double().norm
    torch.nn.init.normal_(norm.weight)
    y, z = torch.randn(2, 3, 5, 48, dtype=torch.float64)
    gated = (y * z * torch.sigmoid(z)).unflatten(-1, (2, 24))
    wanted = (gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * norm.weight
    torch.testing.assert_close(norm(y, z), wanted)


# ----------------------------------------------------------------------------------------------------------------------
# Full passes, pieces, packed and padded sequences


@pytest.mark.parametrize("name", ["dt limits", *HYBRIDS])
@torch.no_grad()
def test_full_pass_equals_pieces(name):
    model = small_model(**(HYBRIDS.get(name) or GRID[name]))
    ids = chain(50)
    whole = model(ids).logits
    for lengths in ([1] * 50, [50 - 13, 13], [7, 1, 1, 30, 1, 10]):
        torch.testing.assert_close(in_pieces(model, ids, lengths), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["ssd", *HYBRIDS])
def test_packed_sequences_are_independent(name):
    model = small_model(**HYBRIDS.get(name, {}))
    lengths = [9, 1, 2, 17, 3]
    ids = chain(sum(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    alone = torch.cat([model(part, use_cache=False).logits for part in ids.split(lengths, 1)], 1)
    names = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))[None]
    for given in ({"cu_seq_lens_q": bounds}, {"position_ids": positions}, {"seq_idx": names}):
        packed = model(ids, **given).logits
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-10)
    weight = torch.randn_like(alone)
    parameters = list(model.parameters())
    wanted = torch.autograd.grad((alone * weight).sum(), parameters, allow_unused=True)
    got = torch.autograd.grad((packed * weight).sum(), parameters, allow_unused=True)
    for (named, _), x, y in zip(model.named_parameters(), got, wanted, strict=True):
        assert (x is None) == (y is None), named
        assert x is None or relative_error(x, y) < 1e-9, named


@torch.no_grad()
def test_packed_sequences_continue_from_their_own_states():
    model = small_model()
    mixer, hidden = model.backbone.layers[0].mixer, torch.randn(1, 20, 24, dtype=torch.float64)
    layers = [SSDCacheLayer() for _ in range(3)]
    first, second = [4, 2, 3], [5, 0, 6]  # the second is not continued
    wanted, parts = [], hidden.split([4, 2, 3, 5, 6], 1)
    for layer, part in zip(layers, parts[:3], strict=True):
        mixer(part, layer)
    packed = SSDCacheLayer()
    mixer(hidden[:, :9], packed, packing=Packing.of(torch.tensor([0, *first]).cumsum(0).int(), 9, 3))
    for row, layer in enumerate(layers):
        torch.testing.assert_close(packed.state[row], layer.state[0])
        torch.testing.assert_close(packed.window[row], layer.window[0])
    wanted = torch.cat([mixer(parts[3], layers[0]), mixer(parts[4], layers[2])], 1)
    got = mixer(hidden[:, 9:], packed, packing=Packing.of(torch.tensor([0, *second]).cumsum(0).int(), 11, 3))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    for row, layer in enumerate(layers):
        torch.testing.assert_close(packed.state[row], layer.state[0])
        torch.testing.assert_close(packed.window[row], layer.window[0])


@pytest.mark.parametrize("name", ["biases", *HYBRIDS])
@torch.no_grad()
def test_padding_changes_nothing(name):
    model = small_model(**(HYBRIDS.get(name) or GRID[name]))
    short, long = chain(11), chain(17)
    left = torch.cat([torch.cat([torch.full((1, 6), PAD), short], 1), long])
    mask = torch.ones_like(left)
    mask[0, :6] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = model(left, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(got[0, 6:], model(short).logits[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(got[1], model(long).logits[0], rtol=0, atol=1e-10)
    right = torch.cat([short, torch.full((1, 3), PAD)], 1)
    caches_ = []
    for ids, keep in ((short, None), (right, (torch.arange(14) < 11).long()[None])):
        caches_.append(DynamicCache(config=model.config))
        model(ids, attention_mask=keep, past_key_values=caches_[-1], use_cache=True)
    plain, padded = map(ssm_states, caches_)
    for layer in plain:
        torch.testing.assert_close(padded[layer], plain[layer], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["ssd", "all"])
def test_gradient_checkpointing_changes_no_gradient(name):
    model = small_model(**HYBRIDS.get(name, {})).train()
    ids, gradients = chain(20), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for named, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][named], gradient, rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# generate() and the cache


@torch.no_grad()
def test_generate_equals_transformers():
    ours, theirs = ours_and_theirs(torch.float32)
    ids = tokens(3, 9)
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = PAD, 0
    for options in ({}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
        options |= {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
        assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))
    torch.manual_seed(3)
    sampled = ours.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=True, top_p=0.95, temperature=0.8)
    torch.manual_seed(3)
    wanted = theirs.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=True, top_p=0.95, temperature=0.8)
    assert torch.equal(sampled, wanted)


@pytest.mark.parametrize("name", HYBRIDS)
@torch.no_grad()
def test_hybrids_generate_what_full_passes_predict(name):
    model = small_model(**HYBRIDS[name])
    model.generation_config.eos_token_id = None
    ids = chain(14)
    for _ in range(12):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids[:, :14], max_new_tokens=12, do_sample=False), ids)
    cache = DynamicCache(config=model.config)
    model.generate(ids[:, :14], max_new_tokens=5, do_sample=False, past_key_values=cache)
    assert cache.get_seq_length() == 18
    options = {
        "do_sample": False,
        "attention_mask": torch.ones(1, 19, dtype=torch.long),
    }  # otherwise generate() infers it from the ids
    assert torch.equal(model.generate(ids[:, :19], max_new_tokens=7, past_key_values=cache, **options), ids)
    assert torch.equal(model.generate(ids[:, :14], max_new_tokens=12, prefill_chunk_size=4, do_sample=False), ids)


@torch.no_grad()
def test_cache_has_constant_size_and_exposes_its_states():
    model = small_model(torch.float32)
    cache, sizes = DynamicCache(config=model.config), []
    for piece in tokens(2, 40).split([1, 9, 1, 28, 1], 1):
        model(piece, past_key_values=cache, use_cache=True)
        sizes.append(caches.cache_bytes(cache))
    assert len(set(sizes)) == 1
    assert (sizes[0].kv, sizes[0].peak_kv) == (0, 0)
    assert sizes[0].state == 2 * 2 * 4 * (6 * 10 * 8 + 3 * (48 + 40))
    states = ssm_states(cache)
    assert [*states] == [0, 1]
    for state in states.values():
        assert state.shape == (2, 6, 10, 8)
        assert state.dtype == torch.float32
    cache.reset()
    assert cache.get_seq_length() == 0
    assert not ssm_states(cache)


@pytest.mark.parametrize("name", ["ssd", "all"])
@torch.no_grad()
def test_snapshots_and_forks_are_unaffected_by_later_tokens(name):
    model = small_model(**HYBRIDS.get(name, {}))
    cache, ids, more = DynamicCache(config=model.config), chain(10), chain(6)
    model(ids, past_key_values=cache, use_cache=True)
    saved = caches.snapshot(cache)
    forked = caches.fork(cache, torch.tensor([0, 0]))

    def decode(cache, rows=1):
        pieces = more.expand(rows, -1).split(1, 1)
        return torch.cat([model(x, past_key_values=cache, use_cache=True).logits for x in pieces], 1)

    first = decode(cache)
    assert cache.get_seq_length() == 16
    torch.testing.assert_close(decode(forked, 2), first.expand(2, -1, -1), rtol=0, atol=1e-12)
    for _ in range(2):
        caches.restore(cache, saved)
        assert torch.equal(decode(cache), first)


# ----------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_groups": 4}, "num_heads must be a multiple of n_groups, got 6 heads and 4 groups"),
        ({"head_dim": 9}, r"must equal num_heads \* head_dim"),
        ({"norm_groups": 5}, "norm_groups must divide .* = 48, got 5"),
        ({"conv_kernel": 0}, "conv_kernel and state_size must be >= 1, got 0"),
        ({"time_step_limit": (0.5, 0.1)}, r"time_step_limit must be \(low, high\)"),
        ({"layer_list": ["ssd"]}, "layer_list must name 2 layers .* got 1"),
        ({"layer_list": ["ssd", "moe"]}, "got 'moe'"),
        ({"layer_list": ["ssd", "attention"]}, "need attention = .* got attention = None"),
        ({"layer_list": ["ssd", "attention"], "attention": {"num_attention_heads": 5}}, "24 is no multiple of .* 5"),
        ({"layer_list": ["ssd", "mixed_attention"], "attention": ATTENTION | {"la_rank": 99}}, "la_rank must lie in"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(Exception, match=message):
        SSDForCausalLM(SSDConfig(**(SMALL | fields)))


def test_models_refuse(tmp_path):
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model of type 'llama', expected 'mamba2' or 'statecore_ssd'"):
        SSDForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"needs an SSDConfig, got Mamba2Config: use SSDConfig.from_mamba2"):
        SSDForCausalLM(Mamba2Config(**SMALL))
    model, ids = small_model(), tokens(1, 6)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="called past_key_values here"):
        model(ids, cache_params=DynamicCache())
    with pytest.raises(ValueError, match="layers of another type"):
        model(ids, past_key_values=DynamicCache())
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="packed sequences cannot be cached"):
        model(ids, past_key_values=cache, cu_seq_lens_q=torch.tensor([0, 2, 6], dtype=torch.int32))
    with pytest.raises(ValueError, match="one row, got a batch of 2"):
        model(tokens(2, 6), cu_seq_lens_q=torch.tensor([0, 6], dtype=torch.int32))
    with pytest.raises(NotImplementedError, match="cannot be run backwards"):
        cache.layers[0].crop(3)
    assert math.isfinite(model(ids, labels=ids).loss.item())


# ----------------------------------------------------------------------------------------------------------------------
# Curriculum

RECIPE = {
    "model": {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 16, "n_groups": 1}
    | {"num_hidden_layers": 2, "initializer_range": 0.02, "tie_word_embeddings": True},
    "tokenizer": {"train": 290},
    "prompt": {"template": "{prompt}\n", "think_open": "<think>", "think_close": "</think>"},
    "max_tokens": 200,
    "too_long": "truncate",
    "training": {"use_cpu": True, "learning_rate": 4e-3, "per_device_train_batch_size": 8, "disable_tqdm": True}
    | {"logging_steps": 5, "max_steps": 10},
    "phases": [
        {"name": "easy", "mixture": [{"programs": {"steps": [1, 2]}, "rows": 80, "part": [0.2, 1.0]}]},
        {
            "name": "hard",
            "mixture": [
                {"programs": {"steps": [2, 3]}, "rows": 60, "filter": {"distinct": {"min": 2}}, "weight": 0.7},
                {"programs": {"steps": [1, 2]}, "rows": 60, "weight": 0.3},
            ],
        },
    ],
    "evaluation": [
        {"name": "held out", "programs": {"steps": [1, 2]}, "rows": 6, "part": [0.0, 0.2]}
        | {"answers": True, "max_new_tokens": 20}
    ],
}


def changed(**values) -> dict:
    return copy.deepcopy(RECIPE) | values


def train(values: dict, folder, **options) -> dict:
    return run_recipe(parse_recipe(values), folder, **({"ablate": False, "seed": 0} | options))


def test_curriculum_trains_saves_and_compares(tmp_path):
    record = train(changed(muon_learning_rate=0.02), tmp_path, ablate=True)
    runs = {tuple(run["phases"]): run for run in record["runs"]}
    assert [*runs] == [(), ("easy",), ("hard",), ("easy", "hard")]
    losses = {names: run["evaluation"]["held out"]["loss"] for names, run in runs.items()}
    assert losses["easy",] < losses[()] - 0.3
    assert losses["easy", "hard"] < losses["easy",]
    assert set(runs["easy", "hard"]["evaluation"]["held out"]) == {
        "rows", "loss", "exact", "closed", "guess"
    }  # fmt: skip
    assert runs["hard",]["training"]["skipped_updates"] == 0
    model = Mamba2ForCausalLM.from_pretrained(runs["easy", "hard"]["folder"])
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert sorted(path.name for path in tmp_path.iterdir() if not path.is_dir()) == [
        "curriculum.png", "report.json", "report.md"
    ]  # fmt: skip
    assert not [*tmp_path.glob(".*"), *tmp_path.glob("checkpoints*")]
    assert "| easy + hard |" in (tmp_path / "report.md").read_text()


def test_curriculum_starts_from_a_checkpoint_and_padding_equals_packing(tmp_path):
    small_model(torch.float32, vocab_size=300, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    losses = []
    for packed in (True, False):
        values = changed(model={"checkpoint": str(tmp_path / "base")}, packed=packed)
        values["phases"] = values["phases"][:1]
        folder = tmp_path / f"{packed}"
        folder.mkdir()
        losses.append([x["loss"] for x in train(values, folder)["runs"][-1]["history"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_programs_are_solved_and_reproducible():
    rows = list(programs(steps=[3, 5], seed=4, count=50))
    again = list(programs(steps=[3, 5], seed=4, count=50))
    assert rows == again
    for row in rows:
        *statements, question = row["problem"].split(".")
        values: dict[str, int] = {}
        for statement in statements:
            name, _, expression = statement.partition("=")
            values[name] = eval(expression, {}, values) % 10
        assert row["answer"] == str(values[question.removesuffix("=?")])
        assert 3 <= row["steps"] <= 5
        assert row["thinking"].count(".") == row["steps"]
        assert row["distinct"] == len(set(values.values()))


def test_filters():
    row = {"tokens": 5, "correct": True, "bench": "none", "score": None}
    for conditions, expected in [
        ({}, True),
        ({"correct": True}, True),
        ({"correct": False}, False),
        ({"tokens": {"min": 5, "max": 5}}, True),
        ({"tokens": {"min": 6}}, False),
        ({"score": {"min": 0}}, False),
        ({"bench": {"none_of": ["none"]}}, False),
        ({"bench": {"any_of": ["none", "x"]}, "tokens": {"max": 4}}, False),
    ]:
        assert passes(row, conditions, "source") == expected, conditions
    with pytest.raises(ValueError, match="source: the filter needs field 'length'; the row has 'tokens', 'correct'"):
        passes(row, {"length": 3}, "source")
    with pytest.raises(ValueError, match="filter of 'tokens' has the unknown 'most'; known are min, max"):
        passes(row, {"tokens": {"most": 3}}, "source")


def test_sources_are_files_and_parts_do_not_overlap(tmp_path):
    rows = [{"problem": f"p{i}", "thinking": "t " * i, "answer": "a", "id": i} for i in range(200)]
    file = tmp_path / "traces.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no json\n")

    def ids(**fields) -> list[str]:
        found = rows_of(Source(source=str(file), **fields))
        return [row.id for row in found if isinstance(row, Row)]

    assert ids(rows=3) == ["1", "2", "3"]  # the first has no thinking
    low, high = ids(part=[0.0, 0.3]), ids(part=[0.3, 1.0])
    assert set(low).isdisjoint(high)
    assert len(low) + len(high) == 199
    assert 30 < len(low) < 90


def test_updates_with_bad_gradients_are_skipped():
    model, skip = small_model(torch.float32), SkipNonFinite()
    for value, skipped in ((1.0, 0), (math.nan, 1), (math.inf, 2)):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        model.lm_head.weight.grad[3, 2] = value
        skip.on_pre_optimizer_step(None, None, None, model=model)
        assert skip.skipped == skipped
        assert all((p.grad is None) == (value != 1) for p in model.parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"phases": []}, "needs at least one phase"),
        ({"phases": [{"name": "a", "mixture": []}]}, "recipe, phase 1: `mixture` names no source"),
        ({"phases": [{"name": "a", "mixture": [{}]}]}, "phase 1, source 1: a source needs either `source` or `prog"),
        ({"phases": [{"mixture": [{"source": "x"}]}]}, "phase 1: .*missing .*'name'"),
        ({"phases": [{"name": "a", "mixture": [{"file": "x"}]}]}, "source 1: unknown 'file'; known are fields, filter"),
        ({"phases": [{"name": "a", "mixture": [{"source": "x", "part": [1, 0]}]}]}, "part must be"),
        ({"phases": [{"name": "a", "mixture": [{"programs": {"steps": [1, 2]}}]}]}, "programs never end"),
        ({"too_long": "wrap"}, "too_long must be 'drop' or 'truncate', got 'wrap'"),
        ({"evaluation": [{"source": "x"}]}, "recipe, evaluation 1: `name` is missing"),
        ({"learning_rate": 1}, "recipe: unknown 'learning_rate'; known are"),
        ({"tokenizer": {"vocabulary": 3}}, "tokenizer must be a name or"),
        ({"model": {"heads": 3}}, "model: unknown heads"),
        ({"training": {"rate": 3}}, "training of phase 'easy': .*unexpected keyword argument 'rate'"),
        ({"max_tokens": 5}, "no row is left; left out for a reason: .*too_long"),
        ({"model": RECIPE["model"] | {"num_heads": 5}}, "must equal num_heads"),
    ],
)
def test_recipes_refuse(values, message, tmp_path):
    with pytest.raises(Exception, match=message):
        train(changed(**values), tmp_path)
    assert not [*tmp_path.iterdir()]


def test_held_out_loss_equals_that_of_single_rows(tmp_path, monkeypatch):
    recipe = parse_recipe(changed())
    curriculum = Curriculum(recipe, tmp_path, tmp_path, 0, lambda text: None)
    model, rows = small_model(vocab_size=len(curriculum.tokenizer)), curriculum.held_out[0][1]
    total = predicted = 0.0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        count = int((labels[0, 1:] >= 0).sum())
        total, predicted = total + model(ids, labels=labels).loss.item() * count, predicted + count
    for max_tokens in (1, 70, 10_000):
        monkeypatch.setattr(evaluation, "MAX_PACK_TOKENS", max_tokens)
        assert evaluation.held_out_loss(model, rows) == pytest.approx(total / predicted, rel=1e-5)


def test_programs_refuse():
    with pytest.raises(ValueError, match=r"steps must be .* got"):
        next(programs(steps=[0, 3]))
    with pytest.raises(ValueError, match="operations may be"):
        next(programs(steps=[1, 3], operations=["*"]))
    with pytest.raises(ValueError, match=r"programs: .*unexpected keyword argument 'depth'"):
        next(rows_of(Source(programs={"depth": 3}, rows=1)))


def test_command_reads_every_committed_recipe(tmp_path):
    folder = Path(__file__).parents[1] / "recipes"
    found = {path.name: read_recipe(path) for path in folder.glob("ssd-*.yaml")}
    assert {"ssd-tiny.yaml", "ssd-promptcot-mamba-7b.yaml"} <= found.keys()
    with pytest.raises(FileNotFoundError, match="there is no recipe"):
        ssd(tmp_path / "none.yaml", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
