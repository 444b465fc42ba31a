"""The rows of the results, and how they are kept in JSON.

Times are seconds, sizes bytes, rates a second. A row with a target says whether it is reached.
"""

from dataclasses import asdict, dataclass, field
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Row:
    """What every row says of its case. heads: "Hq/Hk". threads: 0 on a GPU. failure: why nothing could be measured,
    else empty. unit: of value and target, one of markdown.UNITS.
    """

    operator: str
    dtype: str
    time: int
    heads: str
    width: int
    threads: int = 0
    batch: int = 1
    target: float | None = None
    failure: str = ""
    at_most: ClassVar[bool] = False
    unit: ClassVar[str] = "times"

    @property
    def value(self) -> float:
        """What the target is about."""
        raise NotImplementedError

    @property
    def reached(self) -> bool | None:
        """None where there is no target or nothing was measured."""
        if self.target is None or self.failure:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target


@dataclass(frozen=True, kw_only=True)
class Comparison(Row):
    """Ours against a peer. variant: the peer's fastest form, of those in `tried` (seconds each). peer_host: seconds of
    the CPU to issue a call of it to a GPU.

    work: (our work) / (its work), where the two do not do the same.
    """

    direction: str
    peer: str
    variant: str = ""
    ours_s: float
    ours_spread: float
    peer_s: float = 0.0
    peer_spread: float = 0.0
    peer_host: float = 0.0
    work: float = 1.0
    tried: dict[str, float] = field(default_factory=dict)

    @property
    def value(self) -> float:
        return self.peer_s / self.ours_s * self.work


@dataclass(frozen=True, kw_only=True)
class Preparation(Row):
    """Something a peer needs before its first call, not counted in its time."""

    what: str
    seconds: float
    unit = "ms"

    @property
    def value(self) -> float:
        return self.seconds


@dataclass(frozen=True, kw_only=True)
class LongSequence(Row):
    """A length where the peer would need too much. extra: growth of the peak, None where it cannot be measured."""

    seconds: float
    extra: int | None
    results: int
    peer_needs: int
    unit = "ms"

    @property
    def value(self) -> float:
        return self.seconds


@dataclass(frozen=True, kw_only=True)
class Share(Row):
    """Floating-point operations a second of ours, of the machine's own peak, and of torch's matrix product."""

    ours: float
    spread: float
    peak: float
    matmul: float
    unit = "percent"

    @property
    def value(self) -> float:
        return self.ours / self.peak


@dataclass(frozen=True, kw_only=True)
class Bandwidth(Row):
    """state_update over a pool far larger than the caches: bytes read + written a second, beside a copy's. time is the
    number of rows.
    """

    pool: int
    ours: float
    spread: float
    copy: float
    unit = "percent"

    @property
    def value(self) -> float:
        return self.ours / self.copy


@dataclass(frozen=True, kw_only=True)
class HeadState(Row):
    """state_update inside the caches. seconds: a call; idle: a call on tiny states. time is the number of rows."""

    pool: str
    head_states: int
    seconds: float
    spread: float
    idle: float
    at_most = True
    unit = "us"

    @property
    def value(self) -> float:
        """Seconds a head-state without the cost of a call."""
        return (self.seconds - self.idle) / self.head_states


@dataclass(frozen=True, kw_only=True)
class Growth(Row):
    """Time at the length `time` over that at `short`."""

    short: int
    short_s: float
    long_s: float
    spread: float
    at_most = True

    @property
    def value(self) -> float:
        return self.long_s / self.short_s


@dataclass(frozen=True, kw_only=True)
class Point(Row):
    """A point of the picture of time against length."""

    side: str
    seconds: float
    unit = "ms"

    @property
    def value(self) -> float:
        return self.seconds


@dataclass(frozen=True, kw_only=True)
class Phase(Row):
    """A whole model in one phase, `time` tokens long, on statecore (ours) and on stock attention (stock)."""

    shape: str
    ours_s: float
    stock_s: float
    ours_spread: float | None
    stock_spread: float | None
    ours_cache: int
    stock_cache: int
    ours_extra: int | None
    stock_extra: int | None

    @property
    def value(self) -> float:
        return self.stock_s / self.ours_s


@dataclass(frozen=True, kw_only=True)
class Kernel(Row):
    """Ours on a GPU. bound: seconds of its roofline with the ceilings of the same run; extra: bytes allocated beyond
    inputs and results; host: seconds of the CPU to issue a call. judged: the unit of value and target.
    """

    direction: str
    seconds: float = 0.0
    spread: float = 0.0
    host: float = 0.0
    flops: float = 0.0
    moved: float = 0.0
    bound: float = 0.0
    extra: int | None = None
    judged: str = "ms"

    @property
    def unit(self) -> str:
        return self.judged

    @property
    def at_most(self) -> bool:
        return self.judged in ("ms", "us")

    @property
    def value(self) -> float:
        return self.seconds if self.at_most else self.flops / self.seconds


@dataclass(frozen=True, kw_only=True)
class Launches(Row):
    """Nodes of a CUDA graph for each call that was captured in it."""

    launches: float
    at_most = True
    unit = "launches"

    @property
    def value(self) -> float:
        return self.launches


@dataclass(frozen=True, kw_only=True)
class Ceiling(Row):
    """What the GPU itself does in the same run, a second."""

    what: str
    rate: float
    spread: float
    judged: str

    @property
    def unit(self) -> str:
        return self.judged

    @property
    def value(self) -> float:
        return self.rate


KINDS = {
    kind.__name__: kind
    for kind in (
        Bandwidth, Ceiling, Comparison, Growth, HeadState, Kernel, Launches, LongSequence, Phase, Point, Preparation,
        Share,
    )
}  # fmt: skip


def to_json(row: Row) -> dict:
    return {"kind": type(row).__name__} | asdict(row)


def from_json(fields: dict) -> Row:
    fields = dict(fields)
    return KINDS[fields.pop("kind")](**fields)
