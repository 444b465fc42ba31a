"""Step information gain: how much closer each step of a chain of thought brings the model to its answer.
(CoT-Flow, arXiv 2601.09260)

With I_i = (x, s_1 .. s_i) for prompt x and steps s, and y the answer, in nats:

    v(s_i) = log p(y | I_i) - log p(y | I_{i-1})                 "difference"
           = log p(s_i | I_{i-1}, y) - log p(s_i | I_{i-1})      "posterior": Bayes, posterior over prior

`step_gains` measures both for a given chain, `candidate_gains` for many possible next steps at once, `prompted_gains`
with a posterior that the model itself is prompted for. They read a chain once and fork the cache at every step end, so
a step end costs only the answer's tokens: at constant cost for a state-transition model, whose fork is a handful of
references to prompt and states; with attention over everything before it for any other causal language model.

The paper leaves open what p(y | I) means for a language model. Here the model is made to answer immediately: it reads
`closing` (the end-of-thinking marker, given but not scored, so that no step is penalised for inviting more thinking),
and the answer's tokens are scored. Gains then always sum to log p(y | I_n) - log p(y | I_0). The paper's signs,
E v <= 0 over steps drawn from the prior and E v >= 0 over steps drawn from the posterior, require more: the model's
immediate answer must be the expectation of its answer one step later. With
Z = sum_s p(s | I) p(y | I, s) / p(y | I) over all next steps s,

    E_prior v = log Z - KL(prior || posterior),    E_posterior v = log Z + KL(posterior || prior).

Z = 1 in a joint distribution of steps and answers. A model with log Z > 0 gains from thinking one step more, whichever
step it takes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ..cache import StepCacheLayer, fork, snapshot
from ..modeling import StateCoreForCausalLM
from ..reading import check_token_ids, evaluating, forward

Method = Literal["difference", "posterior"]

# ----------------------------------------------------------------------------------------------------------------------
# Reading and forking

# These cache layers replace their tensors and never write into them, so forks may share the tensors.
_SHAREABLE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StepCacheLayer)
_POSITIONS_PER_SOFTMAX = 1024  # log-probabilities of a long chain over the whole vocabulary would fill the memory


@dataclass(frozen=True)
class Context:
    """What a model has read. Any number of continuations may start from it; none of them changes it.

    next_token: log-probabilities of the next token [V]. cache: None where the model's cache cannot be forked or none is
    wanted; `tokens` then holds what was read, and every continuation reads it again.
    """

    next_token: Tensor | None
    cache: Cache | None
    tokens: tuple[int, ...] = ()


def read(
    model: PreTrainedModel, tokens: Sequence[int], context: Context | None = None, *, cached: bool = True
) -> Context:
    """The context after reading `tokens` (at least one) on top of `context`. `cached=False` keeps tokens, no cache."""
    if not tokens:
        raise ValueError("a context must hold at least one token, got none")
    check_token_ids(model, tokens)
    if not cached or (context is not None and context.cache is None):
        return Context(None, None, (*(context.tokens if context else ()), *tokens))
    with torch.no_grad(), evaluating(model):
        cache = None if context is None else _fork(context.cache)
        logits, cache = forward(model, _batch(model, [tokens]), cache, logits_to_keep=1)
        if context is None and not _can_continue(model, tokens, cache):
            return Context(None, None, tuple(tokens))
        return Context(_log_probs(logits)[0, -1], cache)


def continuation_log_probs(
    model: PreTrainedModel, context: Context, continuations: Sequence[Sequence[int]], *, last: int | None = None
) -> list[Tensor]:
    """Log-probability of every token (of the `last` ones) of each continuation; float64, in one batched pass."""
    check_token_ids(model, [token for row in continuations for token in row])
    rows = [(*context.tokens, *row) for row in continuations]
    scored_from = [len(row) - min(len(new), last or len(new)) for row, new in zip(rows, continuations, strict=True)]
    first = max(min(scored_from) - 1, 0)  # position of the first logits that are needed
    logits = _continuation_logits(model, context.cache, rows, first)
    return [
        _scores(context, row, begin, None if logits is None else logits[i], first)
        for i, (row, begin) in enumerate(zip(rows, scored_from, strict=True))
    ]


def token_log_probs(model: PreTrainedModel, tokens: Sequence[int], *, last: int | None = None) -> Tensor:
    """Log-probability of every token but the first (of the `last` ones), float64: one full pass without a cache."""
    return continuation_log_probs(model, Context(None, None, tuple(tokens[:1])), [tokens[1:]], last=last)[0]


def _continuation_logits(
    model: PreTrainedModel, cache: Cache | None, rows: Sequence[Sequence[int]], first: int
) -> Tensor | None:
    """Logits [N, T, V] from position `first` on, of all tokens but each row's last, whose logits predict nothing that
    is scored. None where the rows hold one token each.
    """
    width = max(map(len, rows)) - 1
    if not width:
        return None
    keep = width - first
    # Attention is causal, so padding at the end reaches no logits that are used.
    padded = _batch(model, [[*row[:-1], *[row[0]] * (width - len(row) + 1)] for row in rows])
    with torch.no_grad(), evaluating(model):
        if cache is None:
            return forward(model, padded, logits_to_keep=keep, use_cache=False)[0]
        if len(rows) == 1 or _is_shareable(cache):
            return forward(model, padded, _fork(cache, len(rows)), logits_to_keep=keep)[0]
        return torch.cat([forward(model, row[None], _fork(cache), logits_to_keep=keep)[0] for row in padded])


def _scores(context: Context, row: Sequence[int], begin: int, logits: Tensor | None, first: int) -> Tensor:
    """Log-probabilities of the tokens row[begin:]; `logits` [T, V] belong to the positions from `first` on."""
    parts = [context.next_token[row[0]][None]] if begin == 0 else []
    begin = max(begin, 1)
    if begin < len(row):
        predicting = logits[begin - 1 - first : len(row) - 1 - first].split(_POSITIONS_PER_SOFTMAX)
        targets = torch.tensor(row[begin:], device=logits.device)[:, None].split(_POSITIONS_PER_SOFTMAX)
        parts += [_log_probs(x).gather(1, y)[:, 0] for x, y in zip(predicting, targets, strict=True)]
    return torch.cat(parts).double().cpu()


def _batch(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(rows, device=next(model.parameters()).device)


def _log_probs(logits: Tensor) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def _is_shareable(cache: Cache) -> bool:
    return all(type(layer) in _SHAREABLE_LAYERS for layer in cache.layers)


def _fork(cache: Cache, rows: int = 1) -> Cache:
    if not _is_shareable(cache):
        return copy.deepcopy(cache)
    return snapshot(cache) if rows == 1 else fork(cache, torch.zeros(rows, dtype=torch.long))


def _can_continue(model: PreTrainedModel, tokens: Sequence[int], cache: Cache | None) -> bool:
    """Whether several tokens at once may follow a copy of the cache.

    Some recurrent models of transformers silently ignore their state then, so a few tokens are tried.
    """
    if cache is None or _is_shareable(cache):
        return cache is not None
    probe = _batch(model, [(list(tokens) * 8)[:8]])
    in_one_pass = _log_probs(forward(model, probe, logits_to_keep=3, use_cache=False)[0])
    start = forward(model, probe[:, :-3], logits_to_keep=1)[1]
    forward(model, probe[:, -3:], _fork(start), logits_to_keep=3)  # must not change what `start` holds
    continued = _log_probs(forward(model, probe[:, -3:], _fork(start), logits_to_keep=3)[0])
    return bool((continued - in_one_pass).abs().max() < 1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Gains


@dataclass(frozen=True)
class StepGains:
    """Gains of n steps in nats; all tensors float64 on the CPU.

    gains: [n]. log_likelihoods: [n + 1], log p(y | I_i), beginning with the prompt alone; None for a prompted
    posterior. prior, posterior: [n], log p(s_i | I_{i-1}) without and with y; None for "difference". cached: whether
    the chain was read once and forked, rather than read again at every step end.
    """

    gains: Tensor
    log_likelihoods: Tensor | None = None
    prior: Tensor | None = None
    posterior: Tensor | None = None
    cached: bool = False


def step_gains(
    model: PreTrainedModel,
    tokens: Sequence[int],
    step_ends: Sequence[int],
    answer: Sequence[int],
    *,
    closing: Sequence[int] = (),
    method: Method = "difference",
    cached: bool = True,
) -> StepGains:
    """The gain of every step of one chain.

    tokens: prompt and steps, including the step tokens of a state-transition model. step_ends: [n + 1], positions after
    the last token of the prompt and of each step. answer: y. closing: the tokens between the last step and y; they are
    read at every step end and not scored.

    method: "difference" forks the cache at every step end (`cached=False` reads everything again there, for
    comparison). "posterior" never uses a cache: p(s_i, y | I_{i-1}) and p(y | I_{i-1}) come from full passes over
    chain, closing and answer, p(s_i | I_{i-1}) from one over the chain. It costs as much as reading everything again,
    also gives prior and posterior, and agrees with "difference" to rounding. Its posterior is Bayes' rule without
    normalisation: summed over all steps it gives the module's Z.
    """
    _check_chain(tokens, step_ends, answer)
    end = [*closing, *answer]
    if method == "posterior":
        return _bayes_gains(model, tokens, step_ends, end, len(answer))
    if method != "difference":
        raise ValueError(f'method must be "difference" or "posterior", got {method!r}')
    context = read(model, tokens[: step_ends[0]], cached=cached)
    found = [continuation_log_probs(model, context, [end], last=len(answer))[0].sum()]
    for begin, stop in pairwise(step_ends):
        context = read(model, tokens[begin:stop], context)
        found.append(continuation_log_probs(model, context, [end], last=len(answer))[0].sum())
    log_likelihoods = torch.stack(found)
    return StepGains(log_likelihoods.diff(), log_likelihoods, cached=context.cache is not None)


def _bayes_gains(
    model: PreTrainedModel, tokens: Sequence[int], step_ends: Sequence[int], end: Sequence[int], scored: int
) -> StepGains:
    """`end` is closing and answer; its last `scored` tokens are the answer's."""
    chain = token_log_probs(model, tokens[: step_ends[-1]])
    evidence = [token_log_probs(model, [*tokens[: step_ends[0]], *end], last=scored).sum()]
    prior, posterior = [], []
    for begin, stop in pairwise(step_ends):
        step = stop - begin
        answered = token_log_probs(model, [*tokens[:stop], *end], last=step + len(end))
        joint = answered[:step].sum() + answered[-scored:].sum()
        prior.append(chain[begin - 1 : stop - 1].sum())  # entry t belongs to token t + 1
        posterior.append(joint - evidence[-1])
        evidence.append(answered[-scored:].sum())
    prior, posterior = torch.stack(prior), torch.stack(posterior)
    return StepGains(posterior - prior, torch.stack(evidence), prior, posterior)


def prompted_gains(
    model: PreTrainedModel, tokens: Sequence[int], step_ends: Sequence[int], posterior_prompt: Sequence[int]
) -> StepGains:
    """Posterior over prior, where the posterior is the model's own after a prompt that tells it the answer.

    posterior_prompt: replaces the prompt, tokens[: step_ends[0]]. Takes two passes for any number of steps. The paper's
    rewards are computed this way, with a template that it does not give. The result obeys no identity: it is what the
    model makes of being told the answer, and the gains do not sum to a difference of answer log-likelihoods.
    """
    _check_chain(tokens, step_ends, posterior_prompt)
    first, last = step_ends[0], step_ends[-1]
    sums = []
    for prompt in (tokens[:first], posterior_prompt):
        scores = token_log_probs(model, [*prompt, *tokens[first:last]])[len(prompt) - 1 :]
        sums.append(torch.stack([scores[begin - first : stop - first].sum() for begin, stop in pairwise(step_ends)]))
    prior, posterior = sums
    return StepGains(posterior - prior, None, prior, posterior)


@dataclass(frozen=True)
class CandidateGains:
    """N candidates for the next step after one context: gains [N], prior log-probabilities [N], and log p(y | I)."""

    gains: Tensor
    prior: Tensor
    log_likelihood: float

    @property
    def log_evidence(self) -> Tensor:
        """log of the sum of p(s | I) exp v(s) over the candidates; log Z where they are all possible steps."""
        return (self.prior + self.gains).logsumexp(0)

    @property
    def posterior(self) -> Tensor:
        """Log-probabilities [N] of the candidates given y, normalised over the candidates."""
        return self.prior + self.gains - self.log_evidence


def candidate_gains(
    model: PreTrainedModel,
    context: Context,
    candidates: Sequence[Sequence[int]],
    answer: Sequence[int],
    *,
    closing: Sequence[int] = (),
    batch_size: int = 64,
) -> CandidateGains:
    """The gain that each of several next steps would have after `context` (made by `read`).

    Candidates are scored in batches of forks of the context's cache.
    """
    if not candidates or not all(candidates) or not answer:
        raise ValueError("expected at least one candidate and an answer, none of them empty")
    before = continuation_log_probs(model, context, [[*closing, *answer]], last=len(answer))[0].sum()
    prior, after = [], []
    for at in range(0, len(candidates), batch_size):
        batch = candidates[at : at + batch_size]
        scores = continuation_log_probs(model, context, [[*step, *closing, *answer] for step in batch])
        prior += [score[: len(step)].sum() for step, score in zip(batch, scores, strict=True)]
        after += [score[-len(answer) :].sum() for score in scores]
    return CandidateGains(torch.stack(after) - before, torch.stack(prior), before.item())


def mark_steps(
    model: StateCoreForCausalLM, prompt: Sequence[int], steps: Sequence[Sequence[int]]
) -> tuple[list[int], list[int], list[int]]:
    """Adds a state-transition model's step tokens to a chain without them: (tokens, step_ends, pattern of each step).

    Each step gets the thinking pattern whose start token the model finds most probable there.
    """
    starts, ends = model.config.step_start_token_ids, model.config.step_end_token_ids
    tokens, step_ends, patterns = list(prompt), [len(prompt)], []
    context = read(model, prompt)
    for step in steps:
        patterns.append(int(context.next_token[starts].argmax()))
        marked = [starts[patterns[-1]], *step, ends[patterns[-1]]]
        tokens += marked
        step_ends.append(len(tokens))
        if len(patterns) < len(steps):
            context = read(model, marked, context)
    return tokens, step_ends, patterns


def _check_chain(tokens: Sequence[int], step_ends: Sequence[int], answer: Sequence[int]) -> None:
    if len(step_ends) < 2:
        raise ValueError(f"step_ends must hold the end of the prompt and of one step or more, got {list(step_ends)}")
    if step_ends[0] < 1 or step_ends[-1] > len(tokens) or any(b <= a for a, b in pairwise(step_ends)):
        raise ValueError(f"step_ends must grow within 1 .. {len(tokens)}, the number of tokens, got {list(step_ends)}")
    if not answer:
        raise ValueError("the answer must hold at least one token, got none")
