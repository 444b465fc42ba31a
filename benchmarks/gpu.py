"""Operators on the current GPU against their peers and its ceilings, within a time.

    python -m benchmarks.gpu                              everything, at most five minutes; writes benchmarks/results/
    python -m benchmarks.gpu --only segment_attention     one operator, and the rest of the page as it was
    python -m benchmarks.gpu --budget 120 --out folder    the most important rows first; names what was left out
    python -m benchmarks.gpu --expected                   needs no GPU: calculates what an H200 allows
    python -m benchmarks.gpu --page                       regenerates the page from the JSON, measures nothing

Writes gpu.json and the page gpu.md made from it (with --expected gpu_expected.md), all or none. For one operator alone,
on either device: `python -m benchmarks.bench_<operator>`.
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
