"""Reading an AnnData: values, coordinates, labels, slides, the tissue graph, embeddings; every message names the value and the fix."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatialfm._checks import check_text
from spatialfm._data._embeddings import check_embedded_together
from spatialfm._settings import warn

if TYPE_CHECKING:
    from anndata import AnnData


def get_matrix(adata: AnnData, layer: str | None = None) -> Any:
    """``adata.X`` or a layer, in memory, as it is (dense or sparse)."""
    if layer is not None and layer not in adata.layers:
        msg = f"layer={layer!r} is not in adata.layers; it holds {[k for k in adata.layers if k is not None]}"
        raise KeyError(msg)
    x = adata.X if layer is None else adata.layers[layer]
    if x is None:
        msg = "adata.X is empty; name the layer that holds the expression with layer="
        raise ValueError(msg)
    if hasattr(x, "to_memory"):
        x = x.to_memory()
    return x[:] if not isinstance(x, np.ndarray) and type(x).__module__.startswith("h5py") else x


def get_coordinates(adata: AnnData, basis: str = "spatial") -> np.ndarray:
    """``obsm[basis]`` as float64 (n_obs, n_dims), finite."""
    if basis not in adata.obsm:
        msg = (
            f"obsm[{basis!r}] is missing; it must hold the cells' coordinates (n_obs, 2). obsm holds {list(adata.obsm)}"
        )
        raise KeyError(msg)
    xy = adata.obsm[basis]
    xy = np.asarray(xy.to_numpy() if isinstance(xy, pd.DataFrame) else xy, dtype=np.float64)
    if xy.ndim != 2 or xy.shape[1] not in (2, 3):
        msg = f"obsm[{basis!r}] has shape {xy.shape}; coordinates must be (n_obs, 2) or (n_obs, 3)"
        raise ValueError(msg)
    bad = ~np.isfinite(xy).all(axis=1)
    if bad.any():
        names = list(adata.obs_names[bad][:3])
        msg = (
            f"obsm[{basis!r}] holds NaN or infinite coordinates for {int(bad.sum())} of {adata.n_obs} cells "
            f"(first: {names}); drop them with adata[np.isfinite(adata.obsm[{basis!r}]).all(axis=1)]"
        )
        raise ValueError(msg)
    return xy


def label_texts(values: Iterable[Any]) -> list[str]:
    """Text of each label; of numbers without a fraction, ``"1"`` and not ``"1.0"``, which is what a missing value makes of whole numbers."""
    values = list(values)
    floats = [float(v) for v in values if isinstance(v, float | np.floating)]
    whole = all(v % 1 == 0 and abs(v) < 2**53 for v in floats)
    return [str(int(v)) if whole and isinstance(v, float | np.floating) else str(v) for v in values]


def as_label(value: Any, labels: Collection[str]) -> str:
    """Text of a value that a user gave, as it stands among ``labels``."""
    return str(value) if str(value) in labels else label_texts([value])[0]


def as_labels(column: pd.Series) -> pd.Categorical:
    """Labels as a categorical of strings with all its categories; missing values stay.

    Categories keep the order that their owner gave them. Where it is that of the alphabet, or there are none, nobody chose it: 1, 2, 10 instead of 1, 10, 2.
    """
    from natsort import natsorted

    given = isinstance(column.dtype, pd.CategoricalDtype)
    values = pd.Categorical(column)
    # Of categories such as 1 and "1", as of the same values in a column of objects, one label is made.
    of_category, names = pd.factorize(np.array(label_texts(values.categories), dtype=object))
    codes = np.r_[of_category, -1][values.codes]
    numbers = pd.api.types.is_numeric_dtype(values.categories.dtype)
    if not (numbers or values.ordered) and (not given or list(names) == sorted(names)):
        order = natsorted(names)
        codes = np.r_[pd.Index(order).get_indexer(names), -1][codes]
        names = np.array(order, dtype=object)
    return pd.Categorical.from_codes(codes, categories=names)


def get_obs_labels(adata: AnnData, key: str, *, name: str) -> pd.Categorical:
    """``obs[key]`` as a categorical of strings without unused categories; missing values stay. ``name`` is the argument."""
    if key not in adata.obs:
        msg = f"{name}={key!r} is not a column of adata.obs; it holds {list(adata.obs.columns)}"
        raise KeyError(msg)
    labels = as_labels(adata.obs[key]).remove_unused_categories()
    check_text(f"obs[{key!r}]", labels.categories)
    return labels


def by_name(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Entries by the text of their keys, as labels are; bytes become text."""
    return dict(zip(label_texts(map(_decoded, values)), map(_decoded, values.values()), strict=True))


def _decoded(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def stored_colors(adata: AnnData, key: str) -> dict[str, Any]:
    """Colour of each category of ``obs[key]`` in ``uns["<key>_colors"]``: a mapping, or a list in the order of the categories, as text or bytes; empty where too few."""
    stored = adata.uns.get(f"{key}_colors")
    if stored is None or key not in adata.obs:
        return {}
    if isinstance(stored, Mapping):
        return by_name(stored)
    values = [stored] if isinstance(stored, str | bytes) else list(stored)
    column = adata.obs[key]
    given = isinstance(column.dtype, pd.CategoricalDtype)
    names = column.cat.categories if given else as_labels(column).categories
    return by_name(dict(zip(names, values, strict=False))) if len(values) >= len(names) else {}


def get_known_labels(adata: AnnData, key: str, *, name: str, effect: str) -> pd.Categorical:
    """As :func:`get_obs_labels`, with a warning that says how many cells have none and with what ``effect``."""
    values = get_obs_labels(adata, key, name=name)
    n_missing = int((values.codes < 0).sum())
    if n_missing == adata.n_obs:
        msg = f"{name}={key!r}: obs[{key!r}] has no value for any of the {adata.n_obs} cells"
        raise ValueError(msg)
    if n_missing:
        warn(
            "%s=%r: obs[%r] has no value for %d of %d cells; %s", name, key, key, n_missing, adata.n_obs, effect
        )  # fmt: skip
    return values


def get_obs_categories(adata: AnnData, key: str, *, name: str) -> pd.Categorical:
    """As :func:`get_obs_labels`, with no value missing."""
    values = get_obs_labels(adata, key, name=name)
    n_missing = int((values.codes < 0).sum())
    if n_missing:
        msg = (
            f"{name}={key!r}: obs[{key!r}] has no value for {n_missing} of {adata.n_obs} cells; fill or drop them first"
        )
        raise ValueError(msg)
    return values


def get_libraries(adata: AnnData, library_key: str | None) -> list[tuple[str, np.ndarray]]:
    """Slides as ``[(name, rows)]``; one slide named ``""`` where ``library_key`` is None."""
    if library_key is None:
        return [("", np.arange(adata.n_obs))]
    values = get_obs_categories(adata, library_key, name="library_key")
    return [(str(c), np.flatnonzero(values.codes == i)) for i, c in enumerate(values.categories)]


def slide_codes(libraries: list[tuple[str, np.ndarray]]) -> np.ndarray:
    """Position (n_obs,) of each cell's slide among ``libraries``."""
    codes = np.empty(sum(len(rows) for _, rows in libraries), np.int64)
    for k, (_, rows) in enumerate(libraries):
        codes[rows] = k
    return codes


def check_within_slides(graph: Any, slide: np.ndarray, library_key: str | None) -> None:
    """Raise where the tissue graph joins cells of different slides."""
    if library_key is None:
        return
    i, j = graph.nonzero()
    n_across = int((slide[i] != slide[j]).sum())
    if n_across:
        msg = (
            f"the tissue graph has {n_across} edges between slides of obs[{library_key!r}]; build it with "
            f"sfm.pp.spatial_neighbors(adata, library_key={library_key!r})"
        )
        raise ValueError(msg)


def get_graph(adata: AnnData, neighbors_key: str = "spatial_neighbors") -> tuple[Any, Any]:
    """Return connectivities and distances of the tissue graph that ``uns[neighbors_key]`` names, as csr."""
    from scipy import sparse

    entry = adata.uns.get(neighbors_key)
    keys = [entry.get(f"{kind}_key") for kind in ("connectivities", "distances")] if isinstance(entry, Mapping) else []
    if not keys or any(key not in adata.obsp for key in keys):
        msg = (
            f"neighbors_key={neighbors_key!r}: no tissue graph stands in adata.uns[{neighbors_key!r}] and adata.obsp; "
            "build one with sfm.pp.spatial_neighbors(adata, library_key=...)"
        )
        raise KeyError(msg)
    connectivities, distances = (sparse.csr_matrix(adata.obsp[key]) for key in keys)
    return connectivities, distances


def get_embedding(adata: AnnData, use_rep: str) -> np.ndarray:
    """``obsm[use_rep]`` as a float array (n_obs, n_columns), finite, of columns that mean the same for all cells."""
    if use_rep not in adata.obsm:
        call = "sfm.tl.embed(adata, model='hibio')" if use_rep.startswith("X_hibio") else "sfm.tl.embed(adata)"
        msg = f"obsm[{use_rep!r}] is missing; run {call} first, or name another embedding with use_rep=, one of {list(adata.obsm)}"
        raise KeyError(msg)
    rep = adata.obsm[use_rep]
    rep = np.asarray(rep.to_numpy() if isinstance(rep, pd.DataFrame) else rep)
    if rep.ndim != 2 or not np.issubdtype(rep.dtype, np.floating):
        msg = f"obsm[{use_rep!r}] has shape {rep.shape} and dtype {rep.dtype}; an embedding is a matrix of floats"
        raise ValueError(msg)
    bad = int((~np.isfinite(rep).all(axis=1)).sum())
    if bad:
        msg = f"obsm[{use_rep!r}] holds NaN or infinite values for {bad} of {adata.n_obs} cells; drop these cells first"
        raise ValueError(msg)
    check_embedded_together(adata, use_rep, rep)
    return rep


def get_result(adata: AnnData, key: str, call: str, *, default: str, field: str) -> Mapping[str, Any]:
    """``uns[key]`` as written by ``call``, ``"tl.annotate(adata, ...)"`` and the like, whose ``key_added`` is ``default``; ``field`` tells it."""
    entry = adata.uns.get(key)
    if not isinstance(entry, Mapping) or field not in entry:
        own = "" if key == default else f", key_added={key!r}"
        msg = f"key={key!r}: nothing of that kind in adata.uns[{key!r}]; run sfm.{call.removesuffix(')')}{own}) first"
        raise KeyError(msg)
    return entry


def canonical_order(matrix: np.ndarray) -> np.ndarray:
    """Sort rows by their content, so that what is computed in this order does not depend on the order of the cells."""
    return np.lexsort(matrix.T[::-1])


def writable(adata: AnnData, *, copy: bool) -> AnnData:
    """Return what a function writes to: ``adata`` itself, a view made actual without a warning, or an in-memory copy."""
    if not copy and not adata.is_view:
        return adata
    own = adata.to_memory() if adata.isbacked else adata.copy()
    if copy:
        return own
    adata._init_as_actual(own)
    return adata
