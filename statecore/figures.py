"""Pictures for files: no display, and no waiting for matplotlib before one is drawn."""

from typing import Any


def new_figure(size: tuple[float, float]) -> Any:
    """A matplotlib figure of `size` inches whose parts make room for each other."""
    from matplotlib.figure import Figure  # here, not above: importing a module that draws should not wait for it

    return Figure(figsize=size, layout="constrained")
