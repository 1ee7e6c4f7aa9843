"""How training went."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spatialfm._checks import checked
from spatialfm.pl._style import given_axes, place_axes, text_width

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_FONT = 9.0
_HELD_OUT, _TRAINING = "#D55E00", "#56B4E9"  # of Okabe and Ito


@checked
def loss_curve(adata: AnnData, key: str = "fine_tune", *, ax: Axes | None = None) -> Axes:
    """Plot the loss of what was held out and of what was trained on, as :func:`spatialfm.tl.fine_tune` wrote them.

    The two are not on one level: what is held out is shown whole and what is trained on with counts missing, and a network in training
    drops half of its decoder's states. What counts is whether the held-out loss falls.

    Parameters
    ----------
    adata
        AnnData with the curve; not changed.
    key
        Entry of ``uns`` with the curve.
    ax
        Axes to draw into.

    Returns
    -------
    The axes.

    Raises
    ------
    KeyError
        If there is no curve in ``uns[key]``.
    """
    entry = adata.uns.get(key, {})
    if "curve" not in entry:
        msg = f"uns[{key!r}] holds no loss curve; sfm.tl.fine_tune(adata, key_added={key!r}) writes one. uns holds {list(adata.uns)}"
        raise KeyError(msg)
    curve = {name: np.asarray(values, dtype=float) for name, values in entry["curve"].items()}
    best = int(entry["best_step"])
    taken = f"model taken (step {best})"
    size = (0.65 + 4.2 + 0.6 + text_width(taken), 0.35 + 2.4 + 0.55)
    axes = place_axes([(0.65, 0.35, 4.2, 2.4)], size)[0] if ax is None else given_axes(ax, 1)[0]
    # The first look is before training.
    axes.plot(curve["step"][-len(curve["loss"]) :], curve["loss"], color=_TRAINING, marker=".", label="training")
    axes.plot(curve["step"], curve["held_out_loss"], color=_HELD_OUT, marker=".", label="held out")
    at_best = curve["step"] == best
    axes.plot(
        curve["step"][at_best],
        curve["held_out_loss"][at_best],
        linestyle="",
        marker="o",
        markersize=9,
        markerfacecolor="none",
        markeredgecolor=_HELD_OUT,
        label=taken,
    )
    axes.set_xlabel("step", fontsize=_FONT + 1)
    axes.set_ylabel("loss", fontsize=_FONT + 1)
    axes.tick_params(labelsize=_FONT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(str(entry["model"]), fontsize=_FONT + 2)
    axes.legend(frameon=False, fontsize=_FONT, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return axes
