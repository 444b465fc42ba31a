"""Tables and numbers as the pages of results show them."""

from collections.abc import Callable, Sequence

Column = tuple[str, Callable[..., str]]


def table(rows: Sequence, columns: list[Column]) -> list[str]:
    """Columns where no row has anything to say are left out."""
    columns = [(name, [cell(row) for row in rows]) for name, cell in columns]
    columns = [(name, cells) for name, cells in columns if any(cells)]
    header = "| " + " | ".join(name for name, _ in columns) + " |"
    body = ["| " + " | ".join(line) + " |" for line in zip(*(cells for _, cells in columns), strict=True)]
    return [header, "|" + "---|" * len(columns), *body]


def plain(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"


def times(ratio: float) -> str:
    return f"{ratio:.3g}x" if ratio < 100 else f"{ratio:.0f}x"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def us(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} us"


def mb(nbytes: int | None) -> str:
    if nbytes is None:
        return "not measurable here"
    return f"{nbytes / 1e6:,.0f} MB" if nbytes >= 1e7 else f"{nbytes / 1e6:.2g} MB"


def giga(rate: float) -> str:
    return f"{rate / 1e9:.0f}"


def percent(share: float) -> str:
    return f"{share:.0%}"


UNITS: dict[str, Callable[[float], str]] = {
    "times": times,
    "percent": percent,
    "us": us,
    "ms": lambda seconds: f"{ms(seconds)} ms",
    "TFLOP/s": lambda rate: f"{rate / 1e12:.0f} TFLOP/s",
    "TB/s": lambda rate: f"{rate / 1e12:.2f} TB/s",
    "launches": lambda count: f"{count:g} launches a call" if count != 1 else "one launch a call",
}
