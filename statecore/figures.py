"""Figures for files: without a display, and without importing matplotlib before one is drawn."""

from typing import Any


def new_figure(size: tuple[float, float]) -> Any:
    """A matplotlib figure of `size` inches with constrained layout."""
    from matplotlib.figure import Figure  # here, because modules that draw should import fast

    return Figure(figsize=size, layout="constrained")
