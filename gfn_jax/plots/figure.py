"""A figure of its own, written whole."""

from collections.abc import Iterator
import contextlib
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.axes
import matplotlib.pyplot as plt

from gfn_jax.files import replacing, to_path


@contextlib.contextmanager
def figure(
  path: str | os.PathLike, title: str, xlabel: str, ylabel: str, legend: bool = True
) -> Iterator[matplotlib.axes.Axes]:
  """Axes to draw in; the PNG is in place when the block ends. A legend stands below, where curves have labels."""
  fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
  try:
    yield ax
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.grid(alpha=0.3)
    if legend:
      fig.legend(loc="outside lower center", ncols=2)
    path = to_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
      fig.savefig(temporary, dpi=120, format="png", bbox_inches="tight")  # a legend may be wider than the axes
  finally:
    plt.close(fig)
