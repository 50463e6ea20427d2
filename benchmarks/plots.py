"""Figures that come out the same, byte by byte, from the same numbers."""

from pathlib import Path
from typing import Any


def new_figure(**settings: Any) -> Any:
    """A matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib  # pyright: ignore[reportMissingImports]
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("plots need matplotlib: `pip install 'svsk-jax[peers]'`") from error
    matplotlib.rcParams["svg.hashsalt"] = "svsk"
    return Figure(**settings)


def save_figure(figure: Any, path: Path) -> None:
    """Write it as SVG, without the date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})
