"""Loss over the steps of training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spatialfm._checks import checked
from spatialfm.pl._style import FONT, given_axes, place_axes, text_width

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_HELD_OUT, _TRAINING = "#D55E00", "#56B4E9"  # of Okabe and Ito


@checked
def loss_curve(adata: AnnData, key: str = "fine_tune", *, ax: Axes | None = None) -> Axes:
    """Plot the training and the validation loss of :func:`spatialfm.tl.fine_tune`.

    The two losses are not on the same level: training hides some of the counts and half of the states of the decoder,
    validation does not. Fine-tuning helped if the validation loss fell.

    Parameters
    ----------
    adata
        AnnData after :func:`spatialfm.tl.fine_tune`; not changed.
    %(result_key)s
    ax
        Axes to draw into; a new figure where None.

    Returns
    -------
    The axes.

    Raises
    ------
    KeyError
        ``uns[key]`` holds no loss curve.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.codex_mouse_spleen()[:0].copy()
    >>> adata.uns["fine_tune"] = {
    ...     "model": "heist-niche",
    ...     "best_step": 20,
    ...     "curve": {"step": [0, 20, 40], "held_out_loss": [0.9, 0.7, 0.8], "loss": [0.8, 0.6]},
    ... }
    >>> ax = sfm.pl.loss_curve(adata)
    >>> ax.get_ylabel()
    'loss'
    """
    entry = adata.uns.get(key, {})
    if "curve" not in entry:
        msg = (
            f"uns[{key!r}] holds no loss curve; sfm.tl.fine_tune(adata, key_added={key!r}) writes one. "
            f"uns holds {list(adata.uns)}"
        )
        raise KeyError(msg)
    curve = {name: np.asarray(values, dtype=float) for name, values in entry["curve"].items()}
    best = int(entry["best_step"])
    kept = f"model kept (step {best})"
    size = (0.65 + 4.2 + 0.6 + text_width(kept), 0.35 + 2.4 + 0.55)
    axes = place_axes([(0.65, 0.35, 4.2, 2.4)], size)[0] if ax is None else given_axes(ax, 1)[0]
    # The first validation is before training.
    axes.plot(curve["step"][-len(curve["loss"]) :], curve["loss"], color=_TRAINING, marker=".", label="training")
    axes.plot(curve["step"], curve["held_out_loss"], color=_HELD_OUT, marker=".", label="validation")
    at_best = curve["step"] == best
    axes.plot(
        curve["step"][at_best],
        curve["held_out_loss"][at_best],
        linestyle="",
        marker="o",
        markersize=9,
        markerfacecolor="none",
        markeredgecolor=_HELD_OUT,
        label=kept,
    )
    axes.set_xlabel("training step", fontsize=FONT + 1)
    axes.set_ylabel("loss", fontsize=FONT + 1)
    axes.tick_params(labelsize=FONT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(str(entry["model"]), fontsize=FONT + 2)
    axes.legend(frameon=False, fontsize=FONT, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return axes
