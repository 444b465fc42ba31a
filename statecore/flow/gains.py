"""Step information gain: how much nearer each step of a chain of thought brings its answer.  (CoT-Flow, arXiv
2601.09260)

With I_i = (x, s_1 .. s_i) for prompt x and steps s, and y the answer, in nats:

    v(s_i) = log p(y | I_i) - log p(y | I_{i-1})                 "difference"
           = log p(s_i | I_{i-1}, y) - log p(s_i | I_{i-1})      "posterior": Bayes, posterior over prior

`step_gains` measures both for a chain that is there, `candidate_gains` for many next steps at once, `prompted_gains`
with a posterior that the model itself is asked for. They read a chain once and fork the cache at every step end, so a
step end costs the tokens of the answer: constant with a state-transition model, whose fork is a handful of references
to prompt and states, and attention over what came before with any other causal language model.

What p(y | I) is in a language model, the paper leaves open. Here the model is made to answer at once: it reads the
`closing` (the end-of-thinking mark, given and not scored, so that no step is blamed for thinking on) and the answer's
tokens are scored. Gains then always sum to log p(y | I_n) - log p(y | I_0). The paper's signs, E v <= 0 over steps from
the prior and E v >= 0 over steps from the posterior, need more: that what the model would answer now is the mean of
what it would answer a step later. With Z = sum_s p(s | I) p(y | I, s) / p(y | I), over all next steps s,

    E_prior v = log Z - KL(prior || posterior),    E_posterior v = log Z + KL(posterior || prior).

Z = 1 in a joint distribution of steps and answers. A model whose log Z > 0 gains by thinking a step more, whatever step
it takes.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ..cache import StepCacheLayer, fork, snapshot
from ..modeling import StateCoreForCausalLM

Method = Literal["difference", "posterior"]

# ----------------------------------------------------------------------------------------------------------------------
# Reading and forking

# Cache layers that replace what they hold and never write into it: a fork shares the tensors.
_SHARED_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StepCacheLayer)


@dataclass(frozen=True)
class Context:
    """What a model has read, to go on from any number of times; nothing that goes on from it changes it.

    next_token: log-probabilities of the token to come [V]. cache: None for a model whose cache cannot be forked, or
    where none is wanted; then `tokens` holds what was read, and it is read anew each time.
    """

    next_token: Tensor | None
    cache: Cache | None
    tokens: tuple[int, ...] = ()


def read(
    model: PreTrainedModel, tokens: Sequence[int], context: Context | None = None, *, cached: bool = True
) -> Context:
    """The context behind `tokens` (at least one), which follow `context`. `cached=False` keeps tokens, not a cache."""
    if not tokens:
        raise ValueError("a context must hold at least one token, got none")
    _check_vocabulary(model, tokens)
    if not cached or (context is not None and context.cache is None):
        return Context(None, None, (*(context.tokens if context else ()), *tokens))
    with _scoring(model):
        logits, cache = _forward(model, [tokens], None if context is None else _fork(context.cache), keep=1)
        if context is None and not _can_go_on(model, tokens, cache):
            return Context(None, None, tuple(tokens))
        return Context(_log_probs(logits)[0, -1], cache)


def continuation_log_probs(
    model: PreTrainedModel, context: Context, continuations: Sequence[Sequence[int]], *, last: int | None = None
) -> list[Tensor]:
    """Log-probability of every token (of the `last` ones) of each continuation; float64, in one batched pass."""
    _check_vocabulary(model, [token for row in continuations for token in row])
    rows = [(*context.tokens, *row) for row in continuations]
    begins = [len(full) - min(len(row), last or len(row)) for full, row in zip(rows, continuations, strict=True)]
    width = max(map(len, rows)) - 1  # nothing is asked of the logits behind the last token
    first = max(min(begins) - 1, 0)
    with _scoring(model):
        if width:
            padded = [[*row[:-1], *[row[0]] * (width - len(row) + 1)] for row in rows]  # nobody sees what lies behind
            if context.cache is None or len(rows) == 1 or _is_shared(context.cache):
                cache = None if context.cache is None else _fork(context.cache, len(rows))
                logits = _forward(model, padded, cache, width - first, use_cache=cache is not None)[0]
            else:
                parts = [_forward(model, [row], _fork(context.cache), keep=width - first)[0] for row in padded]
                logits = torch.cat(parts)
    scores = []
    for i, (row, begin) in enumerate(zip(rows, begins, strict=True)):
        inner = max(begin, 1)
        parts = [context.next_token[row[0]][None]] if begin == 0 else []
        if inner < len(row):
            some = logits[i, inner - 1 - first : len(row) - 1 - first].split(1024)  # a long chain's fill the memory
            wanted = torch.tensor(row[inner:], device=logits.device)[:, None].split(1024)
            parts += [_log_probs(x).gather(1, y)[:, 0] for x, y in zip(some, wanted, strict=True)]
        scores.append(torch.cat(parts).double().cpu())
    return scores


def token_log_probs(model: PreTrainedModel, tokens: Sequence[int], *, last: int | None = None) -> Tensor:
    """Log-probability of every token but the first (of the `last` ones), float64: one whole pass, no cache."""
    return continuation_log_probs(model, Context(None, None, tuple(tokens[:1])), [tokens[1:]], last=last)[0]


def _forward(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], cache: Cache | None, keep: int, use_cache: bool = True
) -> tuple[Tensor, Cache | None]:
    names = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {"use_cache": use_cache}
    if cache is not None:
        arguments["cache_params" if "cache_params" in names else "past_key_values"] = cache
    if "logits_to_keep" in names:
        arguments["logits_to_keep"] = keep
    out = model(input_ids=torch.tensor(rows, device=next(model.parameters()).device), **arguments)
    found = [getattr(out, name, None) for name in ("past_key_values", "cache_params")]
    return out.logits[:, -keep:], next((cache for cache in found if isinstance(cache, Cache)), None)


def _log_probs(logits: Tensor) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def _is_shared(cache: Cache) -> bool:
    return all(type(layer) in _SHARED_LAYERS for layer in cache.layers)


def _fork(cache: Cache, rows: int = 1) -> Cache:
    if not _is_shared(cache):
        return copy.deepcopy(cache)
    return snapshot(cache) if rows == 1 else fork(cache, torch.zeros(rows, dtype=torch.long))


def _can_go_on(model: PreTrainedModel, tokens: Sequence[int], cache: Cache | None) -> bool:
    """Whether several tokens at once may follow a copy of the cache. Not every recurrent model of transformers takes
    them, and one that does not says nothing: so it is tried, on a few tokens.
    """
    if cache is None or _is_shared(cache):
        return cache is not None
    some = (list(tokens) * 8)[:8]
    whole = _log_probs(_forward(model, [some], None, keep=3, use_cache=False)[0])
    begun = _forward(model, [some[:-3]], None, keep=1)[1]
    _forward(model, [some[-3:]], _fork(begun), keep=3)  # a fork that went its own way must leave no trace
    parts = _log_probs(_forward(model, [some[-3:]], _fork(begun), keep=3)[0])
    return bool((parts - whole).abs().max() < 1e-3)


@contextmanager
def _scoring(model: PreTrainedModel) -> Iterator[None]:
    """Without gradients and dropout."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _check_vocabulary(model: PreTrainedModel, tokens: Sequence[int]) -> None:
    size = getattr(model.config.get_text_config(), "vocab_size", None) if hasattr(model, "config") else None
    if size is not None and tokens and not 0 <= min(tokens) <= max(tokens) < size:
        raise ValueError(
            f"token ids must lie in 0 .. {size - 1}, the model's vocabulary, got {min(tokens)} .. {max(tokens)}: the "
            "tokenizer is not this model's"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Gains


@dataclass(frozen=True)
class StepGains:
    """Gains of n steps in nats, all float64 on the CPU.

    gains: [n]. log_likelihoods: [n + 1], log p(y | I_i) from the prompt alone on; None where the model was asked for
    the posterior. prior, posterior: [n], log p(s_i | I_{i-1}) without and with y; None with "difference". cached: the
    chain was read once and forked, not read anew at every step end.
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

    tokens: prompt and steps, a state-transition model's step tokens included. step_ends: [n + 1], where the prompt
    and then each step ends (the position behind its last token). answer: y. closing: what stands between the last step
    and y, read at every step end and not scored.

    method: "difference" forks the cache at every step end (`cached=False` reads everything anew there, for comparison).
    "posterior" never uses a cache: p(s_i, y | I_{i-1}) and p(y | I_{i-1}) come from whole passes over chain, closing
    and answer, p(s_i | I_{i-1}) from one over the chain. It costs what recomputation costs, gives prior and posterior
    besides, and agrees with "difference" to rounding. Its posterior is Bayes' rule without normalisation: over all
    steps it sums to the module's Z.
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
    alone = token_log_probs(model, tokens[: step_ends[-1]])
    evidence = [token_log_probs(model, [*tokens[: step_ends[0]], *end], last=scored).sum()]
    prior, posterior = [], []
    for begin, stop in pairwise(step_ends):
        step = stop - begin
        whole = token_log_probs(model, [*tokens[:stop], *end], last=step + len(end))
        joint = whole[:step].sum() + whole[-scored:].sum()
        prior.append(alone[begin - 1 : stop - 1].sum())  # entry t belongs to token t + 1
        posterior.append(joint - evidence[-1])
        evidence.append(whole[-scored:].sum())
    prior, posterior = torch.stack(prior), torch.stack(posterior)
    return StepGains(posterior - prior, torch.stack(evidence), prior, posterior)


def prompted_gains(
    model: PreTrainedModel, tokens: Sequence[int], step_ends: Sequence[int], posterior_prompt: Sequence[int]
) -> StepGains:
    """Posterior over prior where the posterior is the model's own, behind a prompt that tells it the answer.

    posterior_prompt: stands in place of the prompt, tokens[: step_ends[0]]. Two passes in all, whatever the number of
    steps. The paper's rewards are made so; its template is unknown, and the result is no identity: it is what the model
    makes of being told the answer, and the gains sum to no difference of answer log-likelihoods.
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
    """Gains [N] of N next steps from one context, their log-probabilities there, and log p(y | I) before them."""

    gains: Tensor
    prior: Tensor
    log_likelihood: float

    @property
    def log_evidence(self) -> Tensor:
        """log of the sum of p(s | I) exp v(s): log Z where the candidates are all the steps there are."""
        return (self.prior + self.gains).logsumexp(0)

    @property
    def posterior(self) -> Tensor:
        """Log-probabilities [N] of the candidates given y, summing to 1 over the candidates."""
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
    """The gain that each of several next steps would have (`read` makes the context); batches of forks of one cache."""
    if not candidates or not all(candidates) or not answer:
        raise ValueError("expected at least one candidate and an answer, none of them empty")
    before = continuation_log_probs(model, context, [[*closing, *answer]], last=len(answer))[0].sum()
    prior, after = [], []
    for at in range(0, len(candidates), batch_size):
        part = candidates[at : at + batch_size]
        scores = continuation_log_probs(model, context, [[*step, *closing, *answer] for step in part])
        prior += [score[: len(step)].sum() for step, score in zip(part, scores, strict=True)]
        after += [score[-len(answer) :].sum() for score in scores]
    return CandidateGains(torch.stack(after) - before, torch.stack(prior), before.item())


def mark_steps(
    model: StateCoreForCausalLM, prompt: Sequence[int], steps: Sequence[Sequence[int]]
) -> tuple[list[int], list[int], list[int]]:
    """A chain without step tokens as a state-transition model reads it: (tokens, step_ends, pattern of each step).

    Each step gets the pattern whose start token the model finds most probable there.
    """
    starts, ends = model.config.step_start_token_ids, model.config.step_end_token_ids
    tokens, step_ends, patterns = list(prompt), [len(prompt)], []
    context = read(model, prompt)
    for step in steps:
        patterns.append(int(context.next_token[starts].argmax()))
        piece = [starts[patterns[-1]], *step, ends[patterns[-1]]]
        tokens += piece
        step_ends.append(len(tokens))
        if len(patterns) < len(steps):
            context = read(model, piece, context)
    return tokens, step_ends, patterns


def _check_chain(tokens: Sequence[int], step_ends: Sequence[int], answer: Sequence[int]) -> None:
    if len(step_ends) < 2:
        raise ValueError(f"step_ends must hold the prompt's end and those of one step or more, got {list(step_ends)}")
    if step_ends[0] < 1 or step_ends[-1] > len(tokens) or any(b <= a for a, b in pairwise(step_ends)):
        raise ValueError(f"step_ends must grow within 1 .. {len(tokens)}, the number of tokens, got {list(step_ends)}")
    if not answer:
        raise ValueError("the answer must hold at least one token, got none")
