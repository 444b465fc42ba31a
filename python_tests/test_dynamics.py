"""State dynamics: measures against their definitions, recorded states against a recurrence, pruned models against
models whose heads are silenced, and the commands.
"""

import copy
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from text_cases import chains, character_tokenizer
from text_cases import tiny_model as tiny_language_model
from tiny_models import ENDS, FAMILIES, STARTS, WORDS, random_chain, tiny_base, tiny_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Mamba2Config,
    Mamba2ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from typer.testing import CliRunner

from statecore.adapter import convert, load_adapter, save_adapter
from statecore.cache import cache_bytes
from statecore.cli import app
from statecore.dynamics import (
    MEASURES,
    Head,
    Trajectory,
    bimodality,
    branches,
    cached_states,
    choose_bases,
    choose_heads,
    compare,
    cosine_bound,
    effective_rank,
    head_scores,
    held_out,
    joint_scores,
    key_covariances,
    lower_ranks,
    measure,
    prune_heads,
    read_pieces,
    record,
    side_of_the_asymmetry,
    singular_values,
    summarise,
)
from statecore.dynamics.texts import Text, TextOptions, hold_out, read_texts
from statecore.modeling import LinearBranch, rotate
from statecore.reference import end_step
from statecore.ssd import SSDConfig, SSDForCausalLM, SSDMixer

EXACT = 1e-10
SMALL = {
    "hidden_size": 24, "expand": 2, "num_heads": 6, "head_dim": 8, "state_size": 10, "n_groups": 2,
    "num_hidden_layers": 2, "vocab_size": 60, "chunk_size": 8, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "la_rank": 6, "initializer_range": 0.2}
HYBRID = {
    "layer_list": ["attention", "ssd", "mixed_attention"], "num_hidden_layers": 3,
    "attention": ATTENTION | {"step_start_token_ids": STARTS, "step_end_token_ids": ENDS},
}  # fmt: skip


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Makes every parameter random, so that none drops out of a comparison."""
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "norm_f.weight", ".D")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("A_log"):
            torch.nn.init.uniform_(parameter, -3, 1)
        elif name.endswith((".bias", "dt_bias")):
            torch.nn.init.normal_(parameter, std=0.5)
        elif ".la." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def randomise_branch(branch: LinearBranch) -> None:
    for parameter in branch.parameters():
        torch.nn.init.normal_(parameter, std=0.3)


def small_ssd(dtype: torch.dtype = torch.float64, **fields) -> SSDForCausalLM:
    return randomise(SSDForCausalLM(SSDConfig(**(SMALL | fields)))).to(dtype)


def small_qwen3_next(**fields) -> Qwen3NextForCausalLM:
    config = {
        "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "intermediate_size": 32, "num_experts": 2,
        "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
        "initializer_range": 0.3,
    }  # fmt: skip
    return randomise(Qwen3NextForCausalLM(Qwen3NextConfig(**(config | fields))))


PRUNABLE = {
    "state-transition": (tiny_model, {}),
    "with norm": (tiny_model, {"family": "qwen3", "la_norm": True}),
    "llama without gate": (tiny_model, {"family": "llama", "la_gate": False, "la_projection": "low_rank"}),
    "SSD": (small_ssd, {}),
    "SSD, one group, biases": (small_ssd, {"n_groups": 1, "use_bias": True}),
    "hybrid": (small_ssd, HYBRID),
}


def make(name: str) -> torch.nn.Module:
    build, fields = PRUNABLE[name]
    return build(**fields)


def chain(length: int = 90) -> Tensor:
    return torch.tensor(random_chain(length, 15, 14))


def logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids[None], use_cache=False).logits[0]


def same_logits(first: torch.nn.Module, second: torch.nn.Module, ids: Tensor) -> None:
    """Equal up to rounding, which depends on how the memory of the weights is aligned."""
    tolerance = 1e-12 if first.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(logits(first, ids), logits(second, ids), atol=tolerance, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Measures


@pytest.mark.parametrize(("keys", "values"), [(12, 12), (9, 14), (14, 9)])
def test_rank_grows_by_one_per_token_up_to_the_smaller_dimension(keys, values):
    state = torch.zeros(keys, values)
    for t in range(1, 20):
        state = state + torch.outer(torch.randn(keys), torch.randn(values))
        assert effective_rank(singular_values(state)) == min(t, keys, values)


def test_rank_of_a_known_spectrum_and_why_precision_matters():
    size = 128
    sigma = torch.logspace(0, -6, size, dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0] for _ in range(2))
    state = left * sigma @ right.T
    true = int((sigma > 1e-4).sum())
    assert true == 85
    assert effective_rank(singular_values(state)) == true
    assert effective_rank(singular_values(state.float())) == true
    gram = torch.linalg.eigvalsh(state.float() @ state.float().T).clamp(min=0).sqrt().flip(0)
    assert effective_rank(gram) > true + 4, "a Gram matrix in float32 was expected to miscount"
    rounded = singular_values(state.bfloat16().float())
    assert effective_rank(rounded) > true + 15, "rounding to bfloat16 was expected to count as rank"
    with pytest.raises(ValueError, match=r"bfloat16.*load the model in float32"):
        singular_values(state.bfloat16())


def test_measures_match_their_definitions():
    state = torch.randn(3, 7, 5, dtype=torch.float64)
    found = measure(singular_values(state))
    norms = torch.linalg.matrix_norm(state, "nuc"), torch.linalg.matrix_norm(state), torch.linalg.matrix_norm(state, 2)
    torch.testing.assert_close(found["nuclear"], norms[0])
    torch.testing.assert_close(found["frobenius"], norms[1])
    torch.testing.assert_close(found["stable_rank"], (norms[1] / norms[2]) ** 2)
    transposed = measure(singular_values(state.mT))
    assert all(torch.allclose(found[name], transposed[name]) for name in MEASURES)
    assert all(not value for value in measure(singular_values(torch.zeros(4, 4))).values())
    permuted = measure(singular_values(state[[2, 0, 1]]))
    assert all(torch.allclose(found[name][[2, 0, 1]], permuted[name]) for name in MEASURES)


def test_norms_turn_no_further_than_the_bound():
    states = torch.zeros(5, 8, 8, dtype=torch.float64)
    before = None
    for _ in range(60):
        k, v = torch.randn(2, 5, 8, dtype=torch.float64)
        states = states + k[:, :, None] * v[:, None, :]
        norms = singular_values(states).sum(-1)
        if before is not None:
            update = (k.norm(dim=-1) * v.norm(dim=-1)).norm().item()
            assert (norms - before).norm() <= update + EXACT
            if update < before.norm():
                assert F.cosine_similarity(norms, before, dim=0) >= cosine_bound(update, before.norm().item())
        before = norms


def test_bimodality():
    two = bimodality(np.array([0.0] * 10 + [1.0] * 10))
    assert two["coefficient"] == pytest.approx(1)
    assert (two["low"], two["saturated"], two["gap"], two["threshold"]) == (0.5, 0.5, 1.0, 0.5)
    assert two["between"] == pytest.approx(1)
    uniform = bimodality(np.linspace(0, 1, 2001))
    assert uniform["coefficient"] == pytest.approx(5 / 9, abs=1e-3)
    assert uniform["between"] == pytest.approx(0.75, abs=1e-3)
    assert bimodality(np.full(8, 0.4))["coefficient"] is None
    outlier = bimodality(np.array([1.0] * 11 + [0.95]))
    assert outlier["coefficient"] > 0.9, "the coefficient should call one outlier among equals bimodal"
    assert outlier["gap"] < 0.06


def synthetic_trajectory(seed: int, ranks: np.ndarray, name: str = "a") -> Trajectory:
    """Heads with the given mean ranks plus a little noise."""
    rng = np.random.default_rng(seed)
    values = {m: ranks * np.ones((4, 1)) + rng.uniform(0, 0.01, (4, len(ranks))) for m in MEASURES}
    heads = [Head(i // 4, i % 4, 8) for i in range(len(ranks))]
    positions = np.array([32, 128, 512, 2048])
    return Trajectory(name, heads, positions, positions == 512, values, [np.ones(8)] * len(ranks))


def test_summary_of_stable_and_of_changing_heads():
    ranks = np.array([0.1, 0.2, 0.3, 0.4, 7.6, 7.7, 7.8, 7.9])
    stable = summarise([synthetic_trajectory(0, ranks), synthetic_trajectory(1, ranks)])
    assert stable["early_to_late"]["inputs"][0]["early"] == 128
    assert stable["early_to_late"]["inputs"][0]["late"] == 2048
    assert stable["early_to_late"]["rank"]["spearman"] > 0.99
    assert stable["across_inputs"]["rank"]["spearman"] > 0.99
    assert stable["stratification"]["mean"]["gap"] > 0.9
    assert stable["heads"][4]["rank_at_step_ends"] == pytest.approx(7.6, abs=0.02)
    changed = summarise([synthetic_trajectory(0, ranks), synthetic_trajectory(1, ranks[::-1])])
    assert changed["across_inputs"]["rank"]["spearman"] < -0.99
    alone = summarise([synthetic_trajectory(0, ranks)])
    assert alone["across_inputs"]["rank"]["spearman"] is None
    json.dumps(stable, allow_nan=False)
    with pytest.raises(ValueError, match="at least one recorded text"):
        summarise([])
    with pytest.raises(ValueError, match="different models"):
        summarise([synthetic_trajectory(0, ranks), synthetic_trajectory(0, ranks[:4])])


# ----------------------------------------------------------------------------------------------------------------------
# Recorded states against the recurrence


def inputs_of(model: torch.nn.Module, ids: Tensor, layers: dict[int, torch.nn.Module]) -> dict[int, tuple]:
    """The arguments of the given modules while the model reads everything in one pass."""
    inputs, hooks = {}, []
    for index, module in layers.items():

        def keep(module, arguments, keywords, index=index):
            inputs[index] = (arguments, keywords)

        hooks.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    with torch.no_grad():
        model(ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return inputs


@torch.no_grad()
def ssd_recurrence(mixer: torch.nn.Module, hidden: Tensor, heads: int, width: int, groups: int) -> list[Tensor]:
    """States [H, Dk, Dv] after every token, by Mamba-2's equations applied one token at a time, in float64."""
    mixer = copy.deepcopy(mixer).double()
    inner, shared = heads * width, groups * SMALL["state_size"]
    _, xbc, dt = F.linear(hidden.double(), mixer.in_proj.weight, mixer.in_proj.bias).split(
        [inner, inner + 2 * shared, heads], -1
    )
    states, state = [], torch.zeros(heads, SMALL["state_size"], width, dtype=torch.float64)
    taps = mixer.conv1d.weight[:, 0]
    for t in range(len(hidden)):
        summed = mixer.conv1d.bias.clone() if mixer.conv1d.bias is not None else torch.zeros(xbc.shape[1]).double()
        for back in range(taps.shape[1]):
            if t >= back:
                summed = summed + taps[:, -1 - back] * xbc[t - back]
        x, B, _ = F.silu(summed).split([inner, shared, shared])
        rate = F.softplus(dt[t] + mixer.dt_bias)
        B = B.view(groups, -1).repeat_interleave(heads // groups, 0)
        x = x.view(heads, width)
        decay = torch.exp(-rate * mixer.A_log.exp())
        state = decay[:, None, None] * state + B[:, :, None] * (rate[:, None] * x)[:, None, :]
        states.append(state)
    return states


@torch.no_grad()
def branch_recurrence(attention: torch.nn.Module, hidden: Tensor, rotation: tuple, ids: Tensor) -> list[Tensor]:
    """States of a linear branch after every token, corrected when the next step begins."""
    q, k = (project(hidden).unflatten(-1, (-1, attention.head_dim)) for project in (attention.q_proj, attention.k_proj))
    q, k = attention.normalise(q, k)
    q, k, v, _ = attention.la(hidden, q, k)
    if attention.config.la_rope:
        _, k = rotate([q, k], rotation)
    alpha = attention.config.alpha_table()
    zero = k.new_zeros(k.shape[2], k.shape[3], v.shape[3])
    states, found, step, ended = (zero, zero, zero), [], 0, False
    for t, token in enumerate(ids.tolist()):
        if ended or token in STARTS:
            states, step = end_step(states, step, alpha), step + 1
        states = (states[0] + k[0, t, :, :, None] * v[0, t, :, None, :], *states[1:])
        found.append(states[0])
        ended = token in ENDS
    return found


@torch.no_grad()
def delta_recurrence(layer: torch.nn.Module, hidden: Tensor) -> list[Tensor]:
    """States of a gated delta net after every token, in float64."""
    layer = copy.deepcopy(layer).double()
    hidden = hidden[None].double()
    q, k, v, _, b, a = layer.fix_query_key_value_ordering(layer.in_proj_qkvz(hidden), layer.in_proj_ba(hidden))
    mixed = torch.cat([x.flatten(2) for x in (q, k, v)], -1).transpose(1, 2)
    padded = F.pad(mixed, (layer.conv_kernel_size - 1, 0))
    mixed = F.silu(F.conv1d(padded, layer.conv1d.weight, groups=mixed.shape[1])).transpose(1, 2)[0]
    _, k, v = mixed.split([layer.key_dim, layer.key_dim, layer.value_dim], -1)
    k = F.normalize(k.unflatten(-1, (layer.num_k_heads, -1)), dim=-1, eps=1e-12)
    k = k.repeat_interleave(layer.num_v_heads // layer.num_k_heads, 1)
    v = v.unflatten(-1, (layer.num_v_heads, -1))
    decay, beta = (-layer.A_log.exp() * F.softplus(a[0] + layer.dt_bias)).exp(), b[0].sigmoid()
    state, found = torch.zeros(layer.num_v_heads, k.shape[-1], v.shape[-1], dtype=torch.float64), []
    for t in range(len(k)):
        state = decay[t, :, None, None] * state
        delta = beta[t, :, None] * (v[t] - torch.einsum("hk,hkv->hv", k[t], state))
        state = state + k[t, :, :, None] * delta[:, None, :]
        found.append(state)
    return found


def compare_states(
    model: torch.nn.Module, ids: Tensor, expected: dict[int, list[Tensor]], tolerance: float, transposed: bool = False
) -> None:
    """Compares cached states after pieces of various lengths, and the figures that `record` makes of them."""
    ends = [1, 2, 5, 6, 7, 23, 40, 41, len(ids)]
    for read, cache, _ in read_pieces(model, ids, ends, piece=11):
        found = cached_states(cache)
        assert found.keys() == expected.keys()
        for layer, state in found.items():
            wanted = expected[layer][read - 1]
            state = state[0].double().mT if transposed else state[0].double()
            assert (state - wanted).abs().max() <= tolerance * wanted.abs().max(), (read, layer)
    recorded = record(model, ids, positions=ends, step_ends=[23])
    assert recorded.positions.tolist() == ends
    assert recorded.is_step_end.tolist() == [end == 23 for end in ends]
    for row, read in enumerate(ends):
        wanted = measure(singular_values(torch.cat([states[read - 1] for states in expected.values()])))
        for name in ("nuclear", "frobenius", "stable_rank"):
            np.testing.assert_allclose(recorded.values[name][row], wanted[name].numpy(), rtol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"n_groups": 1, "use_bias": True}, {"conv_kernel": 2}])
def test_recorded_states_of_an_ssd_model(fields):
    model, ids = small_ssd(**fields), torch.randint(2, WORDS, (60,))
    mixers = {index: block.mixer for index, block in enumerate(model.backbone.layers)}
    inputs = inputs_of(model, ids, mixers)
    groups = model.config.n_groups
    expected = {i: ssd_recurrence(mixers[i], inputs[i][0][0][0], 6, 8, groups) for i in mixers}
    compare_states(model, ids, expected, EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_states_of_a_state_transition_model(family):
    model, ids = tiny_model(family), chain()
    layers = {index: layer.self_attn for index, layer in enumerate(model.model.layers)}
    inputs = inputs_of(model, ids, layers)
    expected = {}
    for index, attention in layers.items():
        keywords = inputs[index][1]
        hidden, rotation = keywords["hidden_states"], keywords["position_embeddings"]
        expected[index] = branch_recurrence(attention, hidden, rotation, ids)
    compare_states(model, ids, expected, 1e-6)  # norms before the branch compute in float32, on pieces of other lengths


def test_recorded_states_of_transformers_mamba2():
    model = randomise(Mamba2ForCausalLM(Mamba2Config(**SMALL)))
    ids = torch.randint(2, WORDS, (60,))
    mixers = {index: block.mixer for index, block in enumerate(model.backbone.layers)}
    inputs = inputs_of(model, ids, mixers)
    expected = {i: ssd_recurrence(mixers[i], inputs[i][0][0][0], 6, 8, 2) for i in mixers}
    compare_states(model, ids, expected, 1e-4, transposed=True)


def test_recorded_states_of_transformers_gated_delta_net():
    model, ids = small_qwen3_next(), torch.randint(2, WORDS, (60,))
    layers = {i: layer.linear_attn for i, layer in enumerate(model.model.layers) if hasattr(layer, "linear_attn")}
    assert sorted(layers) == [0, 1, 2]
    inputs = inputs_of(model, ids, layers)
    expected = {i: delta_recurrence(layers[i], inputs[i][1]["hidden_states"][0]) for i in layers}
    compare_states(model, ids, expected, 1e-4)
    assert record(model, ids).heads[0].bound == 8


def test_recording_reads_in_pieces_and_leaves_the_model_unchanged(monkeypatch):
    model, ids = tiny_model().train(), chain(120)
    weights, lengths = copy.deepcopy(model.state_dict()), []
    forward = type(model).forward

    def spy(self, input_ids=None, logits_to_keep=0, **kwargs):
        lengths.append((input_ids.shape[1], logits_to_keep))
        return forward(self, input_ids=input_ids, logits_to_keep=logits_to_keep, **kwargs)

    monkeypatch.setattr(type(model), "forward", spy)
    recorded = record(model, ids, positions=(50,), piece=16)
    assert model.training
    assert all(length <= 16 and kept == 1 for length, kept in lengths)
    monkeypatch.undo()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    step_ends = [i + 1 for i, token in enumerate(ids.tolist()) if token in ENDS]
    assert recorded.positions[recorded.is_step_end].tolist() == step_ends
    assert set(recorded.positions) == {50, len(ids), *step_ends}
    in_one_piece = record(model, ids, positions=(50,), piece=1000)
    for name in MEASURES:
        np.testing.assert_allclose(recorded.values[name], in_one_piece.values[name], rtol=1e-5)
    assert recorded.values["rank"].max() <= model.config.la_rank, (
        "values computed from la_rank numbers cannot have a higher rank"
    )
    every = record(model, ids, positions=(), step_ends=(), every=40)
    assert every.positions.tolist() == [40, 80, 120]


def test_hybrids_are_recorded_where_they_have_states():
    found = record(small_ssd(**HYBRID), chain())
    assert sorted({head.layer for head in found.heads}) == [1, 2]
    assert found.is_step_end.any()


def test_bad_recordings_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="no linear-attention states"):
        record(tiny_base("qwen2"), chain())
    with pytest.raises(ValueError, match="at least one token"):
        record(model, [])
    with pytest.raises(ValueError, match=r"ids must lie in 0 \.\. 59.*tokenizer"):
        record(model, [3, 60])
    with pytest.raises(ValueError, match="epsilon must lie"):
        record(model, chain(), epsilon=0)
    with pytest.raises(ValueError, match="positions and `every`"):
        record(model, chain(), every=0)
    with pytest.raises(ValueError, match=r"1 \.\. 90 tokens, got 91"):
        record(model, chain(), step_ends=[91])


# ----------------------------------------------------------------------------------------------------------------------
# Scores and choices


def test_joint_scores():
    rng = np.random.default_rng(0)
    rank, norm = rng.uniform(0, 1, 12), rng.lognormal(size=12)
    score = joint_scores(rank, norm)
    assert ((score >= 0) & (score <= 1)).all()
    np.testing.assert_allclose(score, 0.5 * rank + 0.5 * norm / norm.max())
    order = rng.permutation(12)
    np.testing.assert_allclose(joint_scores(rank[order], norm[order]), score[order])
    assert (joint_scores(rank, norm, 1.0).argsort() == rank.argsort()).all()
    assert (joint_scores(rank, norm, 0.0).argsort() == norm.argsort()).all()
    layers = np.arange(12) // 4
    by_layer = joint_scores(rank, norm, 0.0, layers)
    assert [by_layer[layers == layer].max() for layer in range(3)] == [1, 1, 1]
    assert (joint_scores(rank, np.zeros(12), 0.5) == 0.5 * rank).all()
    with pytest.raises(ValueError, match="alpha must lie"):
        joint_scores(rank, norm, 1.1)


def test_choice_of_heads():
    heads = [Head(layer, head, 8) for layer in range(3) for head in range(4)]
    scores = np.arange(12) / 12
    assert choose_heads(heads, scores, 1.0) == {layer: [0, 1, 2, 3] for layer in range(3)}
    assert choose_heads(heads, scores, 0.5) == {0: [0, 1, 2, 3], 1: [0], 2: [0]}
    assert choose_heads(heads, scores, 0.5, "reverse") == {0: [3], 1: [3], 2: [0, 1, 2, 3]}
    drawn = choose_heads(heads, scores, 0.5, "random", seed=1)
    assert drawn == choose_heads(heads, -scores, 0.5, "random", seed=1) != choose_heads(heads, scores, 0.5, "random", 2)
    assert sum(map(len, drawn.values())) == 6
    for keep in (0, -0.5, 1.5):
        with pytest.raises(ValueError, match=r"keep is the share of heads.*\(0, 1\]"):
            choose_heads(heads, scores, keep)
    with pytest.raises(ValueError, match=r"leaves 2 of 12 heads.*3 layers.*0\.250"):
        choose_heads(heads, scores, 0.2)
    with pytest.raises(ValueError, match="by must be one of"):
        choose_heads(heads, scores, 0.5, "best")
    with pytest.raises(ValueError, match="each of the 12 heads, got 3"):
        choose_heads(heads, scores[:3], 0.5)


# ----------------------------------------------------------------------------------------------------------------------
# Removed heads


@torch.no_grad()
def silenced(model: torch.nn.Module, keep: dict[int, list[int]]) -> torch.nn.Module:
    """A copy of full size whose other heads output zero."""
    model = copy.deepcopy(model)
    for layer, branch in branches(model).items():
        removed = [head for head in range(len(branch.heads)) if head not in keep.get(layer, branch.heads)]
        width = branch.v.heads[1] if isinstance(branch, LinearBranch) else branch.config.head_dim
        for head in removed:
            rows = slice(head * width, (head + 1) * width)
            if isinstance(branch, LinearBranch):
                branch.v.B[rows] = 0
                continue
            branch.conv1d.weight[rows] = 0
            branch.D[head] = 0
            if branch.conv1d.bias is not None:
                branch.conv1d.bias[rows] = 0
    return model


@pytest.mark.parametrize("name", PRUNABLE)
def test_pruning_heads_equals_silencing_them(name, tmp_path):
    model, ids = make(name), chain()
    heads, scores = head_scores([record(model, ids)])
    keep = choose_heads(heads, scores, 0.6)
    pruned = prune_heads(model, keep)
    expected = logits(silenced(model, keep), ids)
    assert (expected - logits(model, ids)).abs().max() > 1e-3, "the pruned heads should matter"
    torch.testing.assert_close(logits(pruned, ids), expected, atol=EXACT, rtol=0)
    pieces = torch.cat([part for _, _, part in read_pieces(pruned, ids, [3, 40, 41], piece=20, all_logits=True)])
    torch.testing.assert_close(pieces, expected, atol=1e-5, rtol=0)

    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    same_logits(loaded, pruned, ids)
    out = loaded.generate(ids[None, :30], attention_mask=torch.ones(1, 30), max_new_tokens=4, min_new_tokens=4)
    assert out.shape[1] == 34

    def sizes(model: torch.nn.Module) -> tuple[int, int]:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[None], past_key_values=cache)
        states = sum(state.nbytes for state in cached_states(cache).values())
        return states, sum(parameter.numel() for parameter in model.parameters())

    (states, parameters), (whole_states, whole_parameters) = sizes(loaded), sizes(model)
    assert parameters < whole_parameters
    left = {(layer, head) for layer, kept in keep.items() for head in kept}
    remaining = sum((h.layer, h.head) in left for h in heads)
    assert states < whole_states
    if name != "hybrid":
        assert states * len(heads) == whole_states * remaining
    assert {(h.layer, h.head) for h in record(loaded, ids).heads} == {(x, i) for x in keep for i in range(len(keep[x]))}


def test_pruning_twice_equals_pruning_once():
    model, ids = small_ssd(), torch.randint(2, WORDS, (40,))
    once = prune_heads(model, {0: [1, 4], 1: [0, 2, 5]})
    twice = prune_heads(prune_heads(model, {0: [1, 2, 4], 1: [0, 1, 2, 3, 5]}), {0: [0, 2], 1: [0, 2, 4]})
    assert twice.config.state_heads == once.config.state_heads == [[1, 4], [0, 2, 5]]
    same_logits(once, twice, ids)


def test_pruned_models_train_and_frozen_parameters_stay_frozen():
    model = convert(tiny_base("qwen2"), step_start_token_ids=STARTS, step_end_token_ids=ENDS, la_rank=6, alpha_max=0.4)
    model.set_momentum(False)
    pruned = prune_heads(model, {0: [1]})
    assert not pruned.mode.momentum
    trainable = {name for name, parameter in pruned.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    ids = chain()[None]
    pruned.train()(ids, labels=ids).loss.backward()
    assert pruned.model.layers[0].self_attn.la.v.B.grad.abs().max() > 0
    narrow = lower_ranks(small_ssd(torch.float32), {i: torch.eye(10)[None, :, :4].repeat(2, 1, 1) for i in (0, 1)})
    narrow.train()(ids, labels=ids).loss.backward()
    assert narrow.backbone.layers[0].mixer.basis.grad.abs().max() > 0


def test_a_pruned_adapter_is_an_adapter(tmp_path):
    tiny_base("qwen2").save_pretrained(tmp_path / "base")
    model = convert(str(tmp_path / "base"), step_start_token_ids=STARTS, step_end_token_ids=ENDS, la_rank=6)
    for layer in model.model.layers:
        randomise_branch(layer.self_attn.la)
    pruned = prune_heads(model, {1: [0]})
    narrow = lower_ranks(pruned, choose_bases(key_covariances(pruned, [chain()]), 0.5))
    text = chain()
    for name, variant in (("pruned", pruned), ("narrow", narrow)):
        save_adapter(variant, tmp_path / name)
        loaded = load_adapter(None, tmp_path / name)
        assert loaded.config.state_heads == [[0, 1], [0], [0, 1]]
        same_logits(loaded, variant, text)


def test_a_pruned_mamba2_is_saved_as_an_ssd_model(tmp_path):
    original = randomise(Mamba2ForCausalLM(Mamba2Config(**SMALL)))
    original.save_pretrained(tmp_path / "original")
    with pytest.raises(ValueError, match=r"got Mamba2ForCausalLM.*SSDForCausalLM\.from_pretrained"):
        prune_heads(original, {0: [1]})
    pruned = prune_heads(SSDForCausalLM.from_pretrained(tmp_path / "original"), {0: [1, 2, 5]})
    pruned.save_pretrained(tmp_path / "pruned")
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["model_type"] == "statecore_ssd"
    files = [tmp_path / name / "model.safetensors" for name in ("pruned", "original")]
    assert files[0].stat().st_size < files[1].stat().st_size


def test_bad_prunings_are_refused():
    model = small_ssd()
    with pytest.raises(ValueError, match="layer 2 has no state heads"):
        prune_heads(model, {2: [0]})
    for kept in ([], [1, 1], [2, 1], [6], [-1]):
        with pytest.raises(ValueError, match=r"layer 0: expected increasing head numbers in 0 \.\. 5"):
            prune_heads(model, {0: kept})
    with pytest.raises(ValueError, match="state-transition models and SSD models, got Qwen2ForCausalLM"):
        prune_heads(tiny_base("qwen2"), {0: [0]})
    grouped = small_ssd(norm_groups=2)
    with pytest.raises(ValueError, match=r"equally many heads; layer 0 keeps \[2, 1\]"):
        prune_heads(grouped, {0: [0, 1, 3]})
    ids = torch.randint(2, WORDS, (30,))
    expected = logits(silenced(grouped, {0: [0, 1, 3, 5]}), ids)
    torch.testing.assert_close(logits(prune_heads(grouped, {0: [0, 1, 3, 5]}), ids), expected, atol=EXACT, rtol=0)
    for fields, message in (
        ({"state_heads": [[0]]}, "an entry for each of the 2 layers, got 1"),
        ({"state_heads": [[0], [6]]}, r"state_heads of layer 1 must be increasing numbers in 0 \.\. 5"),
        ({"state_ranks": [3, 11]}, r"state_ranks of layer 1 must lie in 1 \.\. 10, got 11"),
    ):
        with pytest.raises(Exception, match=message):
            SSDConfig(**(SMALL | fields))
        with pytest.raises(Exception, match="state_"):
            tiny_model(**{name: [[9]] if name == "state_heads" else [0, 0, 0] for name in fields})


# ----------------------------------------------------------------------------------------------------------------------
# States of lower rank


@pytest.mark.parametrize("name", PRUNABLE)
def test_full_width_changes_nothing_and_half_the_width_halves_the_states(name, tmp_path):
    model, ids = make(name), chain()
    covariances = key_covariances(model, [ids])
    whole = lower_ranks(model, choose_bases(covariances, 1.0))
    torch.testing.assert_close(logits(whole, ids), logits(model, ids), atol=1e-9, rtol=0)
    half = lower_ranks(model, choose_bases(covariances, 0.5))
    pieces = torch.cat([part for _, _, part in read_pieces(half, ids, [3, 40, 41], piece=20, all_logits=True)])
    torch.testing.assert_close(pieces, logits(half, ids), atol=1e-5, rtol=0)
    ranks = half.config.state_ranks
    found = record(half, ids)
    assert all(head.bound <= ranks[head.layer] for head in found.heads)
    half.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    same_logits(loaded, half, ids)
    out = loaded.generate(ids[None, :30], attention_mask=torch.ones(1, 30), max_new_tokens=3, min_new_tokens=3)
    assert out.shape[1] == 33
    again = lower_ranks(half, choose_bases(key_covariances(half, [ids]), 1.0))
    torch.testing.assert_close(logits(again, ids), logits(half, ids), atol=1e-9, rtol=0)


def test_directions_that_span_all_states_lose_nothing():
    model, ids = small_ssd(n_groups=1), torch.randint(2, WORDS, (5,))
    bases = choose_bases(key_covariances(model, [ids]), 0.5)  # five tokens have five keys
    torch.testing.assert_close(logits(lower_ranks(model, bases), ids), logits(model, ids), atol=1e-6, rtol=0)
    for by in ("trailing", "random"):
        other = choose_bases(key_covariances(model, [ids]), 0.5, by)
        assert (logits(lower_ranks(model, other), ids) - logits(model, ids)).abs().max() > 1e-3
        eye = torch.eye(5, dtype=torch.float64)
        torch.testing.assert_close(other[0][0].T @ other[0][0], eye, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="share of the states' width"):
        choose_bases({}, 0)
    with pytest.raises(ValueError, match="by must be 'leading'"):
        choose_bases({0: torch.eye(4)[None].double()}, 0.5, "best")
    with pytest.raises(ValueError, match=r"layers \[0, 1\], got \[0\]"):
        lower_ranks(model, {0: bases[0]})
    with pytest.raises(ValueError, match="layer 0: expected 1 bases, got 2"):
        lower_ranks(model, {i: bases[i].repeat(2, 1, 1) for i in bases})


# ----------------------------------------------------------------------------------------------------------------------
# Comparison


def test_held_out_figures_match_one_pass():
    model, texts = small_ssd(), [torch.randint(2, WORDS, (n,)) for n in (600, 30)]
    found = held_out(model, texts)
    scores = [logits(model, text)[:-1] for text in texts]
    loss = sum(F.cross_entropy(s.float(), t[1:], reduction="sum") for s, t in zip(scores, texts, strict=True))
    assert found["tokens"] == 628
    assert found["loss"] == pytest.approx(loss.item() / 628, rel=1e-6)
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))
    right = sum(int((s.argmax(-1) == t[1:]).sum()) for s, t in zip(scores, texts, strict=True))
    assert found["accuracy"] == right / 628
    with pytest.raises(ValueError, match="at least two tokens"):
        held_out(model, [texts[0][:1]])


def test_comparison_and_its_verdict():
    model, ids = small_ssd(torch.float32), torch.randint(2, WORDS, (70,))
    rows = compare(model, {"joint": prune_heads(model, {0: [0]})}, [ids], ids[:10].tolist())
    assert [row["model"] for row in rows] == ["as it is", "joint"]
    assert rows[1]["state_bytes"] < rows[0]["state_bytes"]
    assert rows[1]["parameters"] < rows[0]["parameters"]
    cache = DynamicCache(config=model.config)
    model(ids[None], past_key_values=cache)
    assert rows[0]["state_bytes"] == cache_bytes(cache).state

    def verdict(high, low, drawn):
        losses = {"as it is": 1.0, "joint": high, "reverse": low, "random 1": drawn}
        return side_of_the_asymmetry([{"model": name, "loss": loss} for name, loss in losses.items()])

    assert "side that the paper reports" in verdict(1.1, 1.5, 1.3)
    assert "0 of them" in verdict(1.1, 1.5, 1.3)
    assert "the reverse of what the paper reports" in verdict(1.5, 1.1, 1.3)
    assert "1 of them" in verdict(1.5, 1.1, 1.3)
    assert "no difference" in verdict(1.1, 1.1, 1.3)


# ----------------------------------------------------------------------------------------------------------------------
# Commands


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of checkpoints that read characters, and of texts."""
    folder = tmp_path_factory.mktemp("dynamics")
    torch.manual_seed(0)
    tokenizer = character_tokenizer()
    small_ssd(torch.float32, vocab_size=len(tokenizer)).save_pretrained(folder / "ssd")
    small_qwen3_next(vocab_size=len(tokenizer)).save_pretrained(folder / "delta")
    tiny_language_model(len(tokenizer), num_attention_heads=4, num_key_value_heads=2).save_pretrained(folder / "base")
    first = len(tokenizer)
    model = convert(
        str(folder / "base"), step_start_token_ids=[first, first + 2], step_end_token_ids=[first + 1, first + 3],
        la_rank=4,
    )  # fmt: skip
    for layer in model.model.layers:
        randomise_branch(layer.self_attn.la)
    save_adapter(model, folder / "adapter")
    for name in ("ssd", "delta", "base", "adapter"):
        tokenizer.save_pretrained(folder / name / "tokenizer")
    rows = chains(4)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "one.txt").write_text(rows[0]["thinking"] + " " + rows[1]["thinking"])
    (folder / "empty.txt").write_text("")
    return folder


@pytest.fixture
def run(monkeypatch):
    def invoke(*arguments):
        arguments = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["statecore", "dynamics", *arguments])
        return CliRunner().invoke(app, ["dynamics", *arguments])

    return invoke


@pytest.mark.parametrize("name", ["ssd", "delta", "adapter"])
def test_record_command(run, place, tmp_path, name):
    out = tmp_path / "out"
    done = run("record", place / name, place / "rows.jsonl", "--output-dir", out, "--positions", 64, "--limit", 2)
    assert done.exit_code == 0, done.output
    files = {"dynamics.json", "report.md", "trajectories.npz"}
    files |= {f"{part}.{end}" for part in ("heads", "trajectories", "spectra") for end in ("png", "json")}
    assert {file.name for file in out.iterdir()} == files
    result = json.loads((out / "dynamics.json").read_text())
    assert [entry["name"] for entry in result["inputs"]] == ["row-0", "row-1"]
    assert all(entry["steps"] > 1 for entry in result["inputs"])
    trajectory = json.loads((out / "trajectories.json").read_text())
    arrays = np.load(out / "trajectories.npz")
    assert 64 in trajectory["positions"]
    np.testing.assert_allclose(arrays["0/rank"], trajectory["rank"])
    assert "rank: Spearman" in (out / "report.md").read_text()
    assert "exists already" in run("record", place / name, place / "rows.jsonl", "--output-dir", out).output
    done = run("record", place / name, place / "one.txt", "--output-dir", out, "--overwrite", "--every", 50)
    assert done.exit_code == 0, done.output
    assert len(json.loads((out / "dynamics.json").read_text())["inputs"]) == 1


@pytest.mark.parametrize(("name", "by"), [("ssd", "joint"), ("ssd", "random"), ("adapter", "reverse")])
def test_prune_command(run, place, tmp_path, name, by):
    out = tmp_path / "out"
    done = run(
        "prune", place / name, place / "rows.jsonl", "--output-dir", out, "--keep", 0.75, "--by", by, "--draws", 1
    )
    assert done.exit_code == 0, done.output
    result = json.loads((out / "pruning.json").read_text())
    assert [row["model"] for row in result["rows"]] == ["as it is", "joint", "reverse", "random 1"]
    assert len({row["parameters"] for row in result["rows"][1:]}) == 1, "the variants should have the same budget"
    assert result["asymmetry"] in done.output
    again = tmp_path / "again"
    assert (out / "model" / "tokenizer").is_dir()
    done = run(
        "record", out / "model", place / "rows.jsonl", "--output-dir", again
    )  # a pruned model can be recorded like any other
    assert done.exit_code == 0, done.output
    heads = json.loads((again / "dynamics.json").read_text())["heads"]
    assert len(heads) == sum(map(len, result["kept"]["random 1" if by == "random" else by].values()))


@pytest.mark.parametrize("name", ["ssd", "adapter"])
def test_lower_command(run, place, tmp_path, name):
    out = tmp_path / "out"
    done = run("lower", place / name, place / "rows.jsonl", "--output-dir", out, "--heldout", place / "one.txt")
    assert done.exit_code == 0, done.output
    result = json.loads((out / "pruning.json").read_text())
    assert [row["model"] for row in result["rows"]] == ["as it is", "leading", "trailing", "random"]
    assert result["state_ranks"] == ([5, 5] if name == "ssd" else [2, 2])
    assert run("record", out / "model", place / "one.txt", "--output-dir", tmp_path / "again").exit_code == 0


def test_mistakes_end_in_one_line_and_leave_no_files(run, place, tmp_path):
    rows, out = place / "rows.jsonl", tmp_path / "out"
    for message, arguments in {
        "no linear-attention states": ("record", place / "base", rows),
        "is empty": ("record", place / "ssd", place / "empty.txt"),
        "expected a text in the field 'story'": ("record", place / "ssd", rows, "--text-field", "story"),
        "(0, 1]": ("prune", place / "ssd", rows, "--keep", "0"),
        "at least 0.167": ("prune", place / "ssd", rows, "--keep", "0.1"),
        "state-transition models and SSD models": ("prune", place / "delta", rows),
        "the states' width": ("lower", place / "ssd", rows, "--keep", "1.5"),
        "alpha must lie": ("prune", place / "ssd", rows, "--alpha", "2"),
    }.items():
        done = run(*arguments, "--output-dir", out)
        assert done.exit_code == 1, done.output
        assert message in done.output
        assert not list(tmp_path.iterdir()), "a failed run left files behind"
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "config.json").write_text("{}")
    assert run("record", wrong, rows, "--output-dir", out).exit_code == 1


def test_texts_get_steps_and_step_tokens(place):
    model = load_adapter(None, place / "adapter")
    options = TextOptions(limit=3)
    plain = read_texts(str(place / "rows.jsonl"), small_ssd(vocab_size=200), str(place / "ssd"), options)
    marked = read_texts(str(place / "rows.jsonl"), model, str(place / "adapter"), options)
    first = len(character_tokenizer())
    assert len(plain) == 3
    for text, marked_text in zip(plain, marked, strict=True):
        assert [token for token in marked_text.tokens if token < first] == text.tokens
        assert len(marked_text.step_ends) == len(text.step_ends)
        assert marked_text.step_ends[0] == text.step_ends[0], "the first step should serve as the prompt"
        assert all(marked_text.tokens[end - 1] in (first + 1, first + 3) for end in marked_text.step_ends[1:])
    assert max(len(text.step_ends) for text in plain) > 2
    cut = read_texts(str(place / "rows.jsonl"), model, str(place / "adapter"), TextOptions(limit=1, max_tokens=70))
    assert len(cut[0].tokens) == 70
    assert all(end <= 70 for end in cut[0].step_ends)


def test_holding_texts_out():
    texts = [Text(str(i), list(range(10)), [4, 10]) for i in range(10)]
    known, scored = hold_out(texts)
    assert (len(known), len(scored)) == (8, 2)
    (known,), (scored,) = hold_out(texts[:1])
    assert known.tokens + scored.tokens == texts[0].tokens
    assert known.step_ends == [4]
    with pytest.raises(ValueError, match="too few to hold some out"):
        hold_out([Text("a", [1, 2], [])])


def test_real_traces_of_a_pretrained_model(shared):
    """The converted character model, with silent branches, has no rank and raises no error."""
    folder = shared / "data" / "tiny_lm" / "babyllama105-qwen2"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    model = convert(str(folder), step_start_token_ids=[105], step_end_token_ids=[106], la_rank=8)
    found = record(model, torch.randint(3, 100, (100,)))
    assert len(found.heads) == 20
    assert not found.values["rank"].any()
    summarise([found])
    assert isinstance(branches(model)[0], LinearBranch)
    assert not isinstance(branches(model)[0], SSDMixer)
