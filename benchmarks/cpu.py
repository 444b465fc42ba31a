"""Operators on the CPU against their peers and the machine's limits, and a whole model.

    python -m benchmarks.cpu                        everything, about a quarter of an hour; writes benchmarks/results/
    python -m benchmarks.cpu --only linear peak     some sections, and the rest of the page as it was
    python -m benchmarks.cpu --page                 regenerates page and pictures from the JSON, measures nothing
    python -m benchmarks.cpu --quick                every section on tiny shapes, writes nothing

Writes cpu.json, the page cpu.md made from it, and the pictures, all or none. For one operator alone, on either device:
`python -m benchmarks.bench_<operator>`.
"""

from benchmarks import (
    bench_decoding,
    bench_linear_attention,
    bench_mixed_attention,
    bench_segment_attention,
    bench_state_update,
    suite,
)
from benchmarks.contest import Question

OPERATORS = (
    bench_segment_attention, bench_linear_attention, bench_state_update, bench_decoding, bench_mixed_attention,
)  # fmt: skip


def questions() -> list[Question]:
    return [question for operator in OPERATORS for question in operator.questions("cpu")]


if __name__ == "__main__":
    suite.main_of_device("cpu", questions())
