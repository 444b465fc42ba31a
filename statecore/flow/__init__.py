"""How much each step of a chain of thought tells about its answer.  (CoT-Flow, arXiv 2601.09260)"""

from .gains import (
    CandidateGains,
    Context,
    Method,
    StepGains,
    candidate_gains,
    continuation_log_probs,
    mark_steps,
    prompted_gains,
    read,
    step_gains,
    token_log_probs,
)

__all__ = [
    "CandidateGains",
    "Context",
    "Method",
    "StepGains",
    "candidate_gains",
    "continuation_log_probs",
    "mark_steps",
    "prompted_gains",
    "read",
    "step_gains",
    "token_log_probs",
]
