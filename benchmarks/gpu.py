"""Operators on the current GPU against their peers and its ceilings, within a time.

    python -m benchmarks.gpu                              everything, at most five minutes; writes benchmarks/results/
    python -m benchmarks.gpu --only segment_attention     one operator, and the rest of the page as it was
    python -m benchmarks.gpu --budget 120 --out folder    the most important rows first; what was left out is named
    python -m benchmarks.gpu --expected                   no GPU: what its ceilings allow, calculated
    python -m benchmarks.gpu --page                       the page anew from the JSON, nothing measured

Written are gpu.json and gpu.md made of it (gpu_expected.md), whole or not at all. One operator alone, on either device,
is `python -m benchmarks.bench_<operator>`.
"""

from benchmarks import (
    bench_linear_attention,
    bench_mixed_attention,
    bench_segment_attention,
    bench_state_update,
    suite,
)
from benchmarks.contest import Question

OPERATORS = bench_linear_attention, bench_segment_attention, bench_mixed_attention, bench_state_update


def questions() -> list[Question]:
    return [question for operator in OPERATORS for question in operator.questions("cuda")]


if __name__ == "__main__":
    suite.main_of_device("cuda", questions())
