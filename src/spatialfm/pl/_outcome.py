"""Predicted outcomes of patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatialfm._checks import checked
from spatialfm.get import outcome_df
from spatialfm.pl._style import FONT, category_colors, given_axes, place_axes, text_width

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_SIDE = 2.5  # side of a panel, inches
_ROW = 0.17  # height of the row of a patient, inches
_CURVE, _BASELINE, _NULL = "#0072B2", "#D55E00", "#BBBBBB"


@checked
def outcome(
    adata: AnnData,
    key: str = "outcome",
    *,
    palette: Mapping[str, Any] | Sequence[Any] | str | None = None,
    ax: Sequence[Axes] | None = None,
) -> list[Axes]:
    """Plot predicted outcomes: ROC curve, AUC beside that of permuted labels, and the prediction of each patient.

    The ROC curve ranks each patient among the held-out patients of the same fold, so that the area under it is the AUC
    (nearly, where folds differ in size). The band shows the 95 % interval of the AUC. Where ``groupby`` was given, the
    dashed lines are curve and AUC of the composition alone. With more than two classes there is a curve for each
    class against the others, without a band.

    In the panel of patients, points are samples, on the line of their patient.

    Parameters
    ----------
    adata
        Samples that :func:`spatialfm.tl.outcome` returned; not changed.
    %(result_key)s
    %(palette)s
    ax
        Three axes to draw into; a new figure where None.

    Returns
    -------
    The axes of the curve, of the permutations and of the patients.

    Raises
    ------
    KeyError
        These are not samples with predictions.
    ValueError
        ``ax`` does not hold three axes, or samples of some patients were removed.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> sfm.tl.embed(adata, library_key="mouse_id")
    >>> strip = (adata.obsm["spatial"][:, 0] // 150).astype(int).astype(str)
    >>> adata.obs["strip"] = adata.obs["mouse_id"].astype(str) + ", " + strip
    >>> samples = sfm.tl.outcome(adata, "age", sample_key="strip", n_folds=3, n_permutations=20)
    >>> roc, permutations, patients = sfm.pl.outcome(samples)
    >>> roc.get_xlabel()
    'false positive rate'
    """
    table = outcome_df(adata, key=key)
    entry = adata.uns[key]
    classes = [str(name) for name in entry["classes"]]
    colors = dict(zip(classes, category_colors(adata, "label", classes, palette), strict=True))
    columns = [f"probability_{name}" for name in classes]
    ranks = [name for name in ("agreement", "composition_agreement") if name in table]
    patients = table.groupby("patient", observed=True).agg(
        {"label": "first", **dict.fromkeys(ranks, "first"), **dict.fromkeys(columns, "mean")}
    )
    n_patients = int(np.sum(entry["n_patients"]))
    if len(patients) < n_patients:
        msg = (
            f"adata holds {len(patients)} of the {n_patients} patients of uns[{key!r}], whose AUC and p-value are "
            "those of all patients; pass all samples"
        )
        raise ValueError(msg)
    if ax is None:
        height = max(_SIDE, _ROW * len(patients))
        names = max(text_width(str(name)) for name in patients.index) + 0.25
        side = max(text_width(f"{name} (n = {len(table)})") for name in classes) + 0.6
        left = 0.6 + 2 * (_SIDE + 0.65) + names
        boxes = [(0.6 + k * (_SIDE + 0.65), 0.55, _SIDE, _SIDE) for k in range(2)]
        axes = place_axes([*boxes, (left, 0.55, _SIDE, height)], (left + _SIDE + side, 0.55 + height + 0.6))
    else:
        axes = given_axes(ax, 3)
    _roc(axes[0], patients, classes, colors, entry)
    _permutations(axes[1], entry)
    _strip(axes[2], table, patients, classes, colors)
    for panel in axes:
        panel.tick_params(labelsize=FONT)
        panel.spines[["top", "right"]].set_visible(False)
    return axes


def _roc(ax: Axes, patients: pd.DataFrame, classes: list[str], colors: dict[str, Any], entry: Any) -> None:
    from scipy.stats import norm

    ax.plot([0, 1], [0, 1], color=_NULL, linewidth=1, linestyle="--")
    if len(classes) == 2:
        at = np.linspace(0, 1, 201)
        # Areas of exactly 0 or 1 would add infinities of opposite sign.
        low, high = (
            norm.cdf(np.sqrt(2) * norm.ppf(area) + norm.ppf(at)) for area in np.clip(entry["interval"], 1e-9, 1 - 1e-9)
        )
        ax.fill_between(at, low, high, color=_CURVE, alpha=0.18, linewidth=0)
    for ranks, style in (("composition_agreement", "--"), ("agreement", "-")):
        for name in (classes if len(classes) > 2 else classes[1:]) if ranks in patients else ():
            outranked = np.sort(1 - patients[ranks].to_numpy()[patients["label"].astype(str) == name])
            ax.step(
                [0, *outranked, 1],
                np.append(np.arange(len(outranked) + 1) / len(outranked), 1),
                where="post",
                color=colors[name] if len(classes) > 2 else _CURVE if ranks == "agreement" else _BASELINE,
                linestyle=style,
                linewidth=1.8 if ranks == "agreement" else 1.2,
                clip_on=False,
            )
    if "baselines" in entry:
        ax.plot(
            [],
            [],
            color=_BASELINE,
            linestyle="--",
            linewidth=1.2,
            label=f"composition: {entry['baselines']['composition']['auc']:.2f}",
        )
        ax.legend(frameon=False, fontsize=FONT - 1, loc="lower right")
    low, high = entry["interval"]
    ax.set_title(f"AUC {entry['auc']:.2f} (95 %: {low:.2f} to {high:.2f})", fontsize=FONT + 1.5)
    positive = classes[1] if len(classes) == 2 else "each class"
    ax.set_xlabel("false positive rate", fontsize=FONT + 1)
    ax.set_ylabel(f"true positive rate ({positive})", fontsize=FONT + 1)
    ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))


def _permutations(ax: Axes, entry: Any) -> None:
    null = np.asarray(entry["null"])
    ax.hist(null, bins=40, range=(0, 1), color=_NULL)
    ax.axvline(entry["auc"], color=_CURVE, linewidth=2)
    if "baselines" in entry:
        ax.axvline(entry["baselines"]["composition"]["auc"], color=_BASELINE, linestyle="--", linewidth=1.2)
    ax.set_title(f"p = {entry['p']:.2g}, {len(null):,} permutations", fontsize=FONT + 1.5)
    ax.set_xlabel("AUC (line: true labels)", fontsize=FONT + 1)
    ax.set_ylabel("permutations", fontsize=FONT + 1)
    ax.set_xlim(0, 1.01)


def _strip(ax: Axes, table: pd.DataFrame, patients: pd.DataFrame, classes: list[str], colors: dict[str, Any]) -> None:
    label = patients["label"].astype(str).to_numpy()
    own = [classes[1] if len(classes) == 2 else name for name in label]
    mean = np.array([patients[f"probability_{name}"].iloc[i] for i, name in enumerate(own)])
    order = np.lexsort(np.stack([mean, [classes.index(name) for name in label]]))
    for line, i in enumerate(order):
        points = table.loc[(table["patient"] == patients.index[i]).to_numpy(), f"probability_{own[i]}"]
        ax.plot([points.min(), points.max()], [line, line], color=colors[label[i]], linewidth=1)
        ax.plot(points, np.full(len(points), line), linestyle="", marker="o", markersize=5, color=colors[label[i]])
    marks = [ax.plot([], [], linestyle="", marker="o", markersize=5, color=colors[name])[0] for name in classes]
    named = [f"{name} (n = {int((label == name).sum())})" for name in classes]
    ax.axvline(1 / len(classes), color=_NULL, linewidth=1, linestyle="--", zorder=0)
    ax.set_yticks(np.arange(len(order)), [str(patients.index[i]) for i in order])
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.7, len(order) - 0.3))
    what = classes[1] if len(classes) == 2 else "the true class"
    ax.set_xlabel(f"predicted probability of {what}", fontsize=FONT + 1)
    ax.set_title("held-out patients", fontsize=FONT + 1.5)
    ax.legend(
        marks, named, frameon=False, fontsize=FONT, loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.1
    )
