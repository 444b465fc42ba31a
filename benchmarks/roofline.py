"""The least time an operator can take on a GPU: its floating-point work on the tensor cores or its bytes through device
memory, whichever takes longer. The only place where either is counted.

Letters: B batch, T time, Hq / Hk query / key heads, D width, e bytes of an element, P visible pairs of tokens.

Work is what no implementation that keeps its states on the chip can avoid: of causal triangles the visible half, in the
backward of linear attention the states once again (storing them would cost more). Bytes are each input read once and
each result written once.

- linear attention: chunks of C = 64. A token takes Hq (2 D D + 2 D (C + 1)) + Hk 2 D D forward; backward that again for
  dq, then Hk 4 D D + Hq (2 D D + 4 D (C + 1)). Forward it moves e D (2 Hq + 2 Hk) bytes (q, out; k, v), backward
  e D (3 Hq + 4 Hk) (q, dout, dq; k, v, dk, dv), each way 4 Hk more with a decay (8 Hk backward); a sequence writes its
  final states, 4 Hk D D each.
- segment attention: 4 D P Hq forward, 10 D P Hq backward; e D (2 Hq + 2 Hk) + 4 Hq + 4 bytes a token forward (with the
  logarithm of the denominators and the step ids), e D (4 Hq + 4 Hk) + 4 Hq + 4 backward.
- mixed attention: the work of both; e D (4 Hq + 4 Hk) + 4 bytes a token forward, e D (7 Hq + 8 Hk) + 4 backward.
- state update: a row takes 2 D D (Hq + Hk) and moves 8 D D Hk + e D (2 Hq + 2 Hk) bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.contest import BACKWARD, BOTH, FORWARD
from benchmarks.workload import Case, attention_flops, chunked_flops

CHUNK = 64  # tokens of linear attention that are multiplied at once
STATE = 4  # bytes of an element of a state


@dataclass(frozen=True)
class Ceilings:
    """What a GPU reaches: operations of a matrix product and bytes of a copy (read + written) a second."""

    flops: float
    bytes: float


H200 = Ceilings(790e12, 4.3e12)  # bfloat16


@dataclass(frozen=True)
class Work:
    """One pass over the inputs."""

    flops: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, ceilings: Ceilings) -> float:
        return max(self.flops / ceilings.flops, self.bytes / ceilings.bytes)


Passes = tuple[Work, ...]  # that run one after the other


def bound(passes: Sequence[Work], ceilings: Ceilings) -> float:
    """The least seconds of all passes together."""
    return sum(work.seconds(ceilings) for work in passes)


def linear_attention(case: Case, decay: bool = False, states: int = 1) -> dict[str, Passes]:
    """{direction: passes}. states: results of D x D a sequence and key head."""
    queries, keys = case.heads
    tokens, row = case.batch * case.time, case.dtype.itemsize * case.width
    flops = chunked_flops(tokens, case.heads, case.width, CHUNK)
    decays = 4 * keys * decay
    written = STATE * states * case.batch * keys * case.width**2
    return _directions(
        Work(flops["forward"], tokens * (row * (2 * queries + 2 * keys) + decays) + written),
        Work(flops["backward"], tokens * (row * (3 * queries + 4 * keys) + 2 * decays) + written),
    )


def segment_attention(case: Case, pairs: int) -> dict[str, Passes]:
    """pairs: of one sequence."""
    queries, keys = case.heads
    tokens, row = case.batch * case.time, case.dtype.itemsize * case.width
    flops = case.batch * attention_flops(pairs, case)
    small = 4 * queries + 4
    return _directions(
        Work(flops, tokens * (row * (2 * queries + 2 * keys) + small)),
        Work(2.5 * flops, tokens * (row * (4 * queries + 4 * keys) + small)),
    )


def mixed_attention(case: Case, pairs: int) -> dict[str, Passes]:
    queries, keys = case.heads
    tokens, row = case.batch * case.time, case.dtype.itemsize * case.width
    ways = zip(segment_attention(case, pairs)[BOTH], linear_attention(case)[BOTH], strict=True)
    forward, backward = (segment.flops + linear.flops for segment, linear in ways)
    return _directions(
        Work(forward, tokens * (row * (4 * queries + 4 * keys) + 4)),
        Work(backward, tokens * (row * (7 * queries + 8 * keys) + 4)),
    )


def state_update(case: Case) -> Work:
    """case.time rows."""
    queries, keys = case.heads
    area = case.width**2
    moved = 2 * STATE * area * keys + case.dtype.itemsize * case.width * (2 * queries + 2 * keys)
    return Work(case.time * 2 * area * (queries + keys), case.time * moved)


def _directions(forward: Work, backward: Work) -> dict[str, Passes]:
    return {FORWARD: (forward,), BACKWARD: (backward,), BOTH: (forward, backward)}
