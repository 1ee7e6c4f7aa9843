"""Read values, coordinates, labels, slides, tissue graphs and embeddings of an AnnData, with clear errors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from spatialfm._checks import check_text
from spatialfm._settings import warn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from anndata import AnnData

_MAX_EXTENT = 1e15
_MAX_LENGTHS = 200_000
_MAX_STALE = 0.01
"""Share of edges whose length may differ by more than a quarter from the coordinates, as cells may be moved by hand."""


def get_matrix(adata: AnnData, layer: str | None = None) -> Any:
    """Read ``adata.X`` or a layer as real numbers: a read-only csr (canonical, without zeros) or C-ordered array.

    The matrix may be sparse of any format, backed, dask, masked (masked values become NaN) or of Python objects. NaN
    stays.
    """
    if layer is not None and layer not in adata.layers:
        msg = f"layer={layer!r} is not in adata.layers; it holds {[k for k in adata.layers if k is not None]}"
        raise KeyError(msg)
    x: Any = adata.X if layer is None else adata.layers[layer]
    where = "adata.X" if layer is None else f"layers[{layer!r}]"
    if x is None:
        msg = "adata.X is empty; name the layer that holds the expression with layer="
        raise ValueError(msg)
    x = in_memory(x)
    if sparse.issparse(x):
        x = x.tocsr()
        # Flags of the old matrix may be out of date; a new one has none.
        x = sparse.csr_matrix((_as_numbers(x.data, where), x.indices, x.indptr), shape=x.shape)
        if not x.has_canonical_format:
            x = x.copy()
            x.sum_duplicates()
        if not x.data.all():
            x = x.copy()
            x.eliminate_zeros()
        for name in ("data", "indices", "indptr"):
            setattr(x, name, _read_only(getattr(x, name)))
        return x
    return _read_only(np.ascontiguousarray(_as_numbers(np.asarray(x), where)))


def in_memory(x: Any) -> Any:
    """Read an array or a table of a backed file, dask, xarray or a masked array into memory."""
    if hasattr(x, "to_memory"):  # anndata's sparse matrices and tables on disk
        x = x.to_memory()
    if hasattr(x, "compute"):  # dask, xarray
        x = x.compute()
    if isinstance(x, pd.DataFrame) or sparse.issparse(x):
        return x
    if type(x).__module__.startswith(("h5py", "zarr")):
        return x[()]
    if hasattr(x, "to_numpy"):
        x = x.to_numpy()
    if np.ma.isMaskedArray(x):
        x = x.astype(np.promote_types(x.dtype, np.float32) if x.dtype.kind in "biuf" else x.dtype)
        x = x.filled(np.nan)
    return x


def _as_numbers(x: np.ndarray, where: str) -> np.ndarray:
    """Convert to integers, float32 or float64 in native byte order; raises where values are no real numbers."""
    if x.dtype.kind == "O":
        try:
            return x.astype(np.float64)
        except (TypeError, ValueError):
            wrong = next((v for v in x.ravel().tolist() if not isinstance(v, int | float | np.number)), x.ravel()[0])
            msg = (
                f"{where} holds Python objects, and {wrong!r} among them is no number; convert it, e.g. adata.X = "
                "adata.X.astype('float32')"
            )
            raise ValueError(msg) from None
    if x.dtype.kind not in "biuf":
        msg = (
            f"{where} has dtype {x.dtype}, and expression is real numbers; convert it, e.g. adata.X = "
            "adata.X.real.astype('float32')"
        )
        raise ValueError(msg)
    if x.dtype.kind == "b" or (x.dtype.kind == "f" and x.dtype.itemsize == 2):
        return x.astype(np.float32)
    if x.dtype.kind == "f" and x.dtype.itemsize > 8:
        with np.errstate(over="ignore", under="ignore"):
            return x.astype(np.float64)
    return x.astype(x.dtype.newbyteorder("="), copy=False)


def _read_only(x: np.ndarray) -> np.ndarray:
    view = x.view()
    view.flags.writeable = False
    return view


def get_table(table: Any) -> pd.DataFrame:
    """Copy ``obs`` or ``var`` as a table in memory, also that of a lazy AnnData."""
    return table.to_memory() if hasattr(table, "to_memory") else table.copy()


def get_column(table: Any, key: str) -> pd.Series:
    """Take a column of ``obs`` or ``var`` in memory, also that of a lazy AnnData."""
    column = table[key]
    if isinstance(column, pd.DataFrame):
        msg = f"{column.shape[1]} columns are named {key!r}, so the name is ambiguous; rename or drop all but one"
        raise ValueError(msg)
    return column.to_series() if not isinstance(column, pd.Series) and hasattr(column, "to_series") else column


def warn_off_tissue(adata: AnnData) -> None:
    """Warn of spots off the tissue by ``obs["in_tissue"]``, as in the raw matrix of Space Ranger."""
    if "in_tissue" not in adata.obs:
        return
    column = pd.to_numeric(
        get_column(adata.obs, "in_tissue").astype(str).str.lower().replace({"false": "0", "true": "1"}), errors="coerce"
    )
    n_off = int((column == 0).sum())
    if n_off:
        warn(
            "%d of %d spots lie off the tissue by obs['in_tissue'], but are used; leave them out with "
            "adata[adata.obs['in_tissue'] == 1].copy()",
            n_off, adata.n_obs,
        )  # fmt: skip


def raw_hint(adata: AnnData, name: str | None = None) -> str:
    """End of an error on values or on the gene ``name`` if ``adata.raw`` has them, otherwise an empty text."""
    if adata.raw is None or (name is not None and name not in adata.raw.var_names):
        return ""
    return f"; adata.raw holds {'other values' if name is None else repr(name)}, take it with adata.raw.to_adata()"


def check_cells(adata: AnnData) -> None:
    """Raise where there are no cells."""
    if adata.n_obs == 0:
        msg = f"adata holds no cells, only {adata.n_vars} genes; an earlier filter may have removed all"
        raise ValueError(msg)


def get_coordinates(adata: AnnData, basis: str = "spatial") -> np.ndarray:
    """Read ``obsm[basis]`` as finite float64 (n_obs, n_dims) of at least one cell."""
    check_cells(adata)
    if basis not in adata.obsm:
        msg = (
            f"obsm[{basis!r}] is missing; it must hold the cells' coordinates (n_obs, 2). "
            f"{_where_coordinates_are(adata, basis)}"
        )
        raise KeyError(msg)
    xy = _numbers(adata.obsm[basis], f"obsm[{basis!r}]")
    if xy.ndim != 2 or xy.shape[1] not in (2, 3):
        msg = f"obsm[{basis!r}] has shape {xy.shape}; coordinates must be (n_obs, 2) or (n_obs, 3)"
        raise ValueError(msg)
    bad = ~np.isfinite(xy).all(axis=1)
    if bad.any():
        names = list(adata.obs_names[bad][:3])
        known = (
            f"adata.obsm[{basis!r}].apply(pd.to_numeric).notna()"
            if isinstance(adata.obsm[basis], pd.DataFrame)
            else f"np.isfinite(adata.obsm[{basis!r}])"
        )
        msg = (
            f"obsm[{basis!r}] holds NaN or infinite coordinates for {int(bad.sum())} of {adata.n_obs} cells "
            f"(first: {names}); drop them with adata[{known}.all(axis=1)]"
        )
        raise ValueError(msg)
    extent = float(np.abs(xy).max()) if xy.size else 0.0
    if extent > _MAX_EXTENT or 0 < extent < 1 / _MAX_EXTENT:
        msg = (
            f"obsm[{basis!r}] holds coordinates as large as {extent:.3g}, for which lengths are not exact; convert "
            "them "
            "to pixels or micrometres"
        )
        raise ValueError(msg)
    return xy


def label_texts(values: Iterable[Any]) -> list[str]:
    """Text of each label: whole numbers as ``"1"``, also where a missing value has turned them into floats."""
    values = list(values)
    floats = [float(v) for v in values if isinstance(v, float | np.floating)]
    whole = all(v % 1 == 0 and abs(v) < 2**53 for v in floats)
    return [str(int(v)) if whole and isinstance(v, float | np.floating) else str(v) for v in values]


def as_label(value: Any, labels: Collection[str]) -> str:
    """Text of a value that a user gave, as it occurs among ``labels``."""
    return str(value) if str(value) in labels else label_texts([value])[0]


def as_labels(column: pd.Series) -> pd.Categorical:
    """Convert labels to a categorical of strings with all its categories; missing values stay.

    Categories keep their order, unless it is the alphabetical one, which pandas makes: then 1, 2, 10 instead of 1, 10,
    2.
    """
    from natsort import natsorted

    given = isinstance(column.dtype, pd.CategoricalDtype)
    try:
        values = pd.Categorical(column)
    except TypeError as error:
        msg = (
            f"obs[{column.name!r}] holds values that are no labels, such as {column.iloc[0]!r}; make them text, as "
            f"with adata.obs[{column.name!r}] = adata.obs[{column.name!r}].astype(str)"
        )
        raise ValueError(msg) from error
    # Categories such as 1 and "1" become one label, as they do in a column of objects.
    of_category, names = pd.factorize(np.array(label_texts(values.categories), dtype=object))
    codes = np.r_[of_category, -1][values.codes]
    numbers = pd.api.types.is_numeric_dtype(values.categories.dtype)
    if not (numbers or values.ordered) and (not given or list(names) == sorted(names)):
        order = natsorted(names)
        codes = np.r_[pd.Index(order).get_indexer(names), -1][codes]
        names = np.array(order, dtype=object)
    return pd.Categorical.from_codes(codes, categories=names)


def _numbers(values: Any, where: str) -> np.ndarray:
    """Convert an array or a table to float64, with NaN for missing values."""
    values = in_memory(values)
    if hasattr(values, "toarray"):
        values = values.toarray()
    if isinstance(values, pd.DataFrame):
        table, text = {}, []
        for name in values.columns:
            try:
                table[name] = pd.to_numeric(values[name]).to_numpy(np.float64, na_value=np.nan)
            except (TypeError, ValueError):
                text.append(name)
        if text:
            fix = f"; keep the columns of numbers: adata.{where} = adata.{where}[{list(table)}]" if table else ""
            msg = f"{where} has columns that are no numbers: {text}{fix}"
            raise ValueError(msg)
        return np.column_stack(list(table.values())) if table else np.empty((len(values), 0))
    values = np.asarray(values)
    try:
        if values.dtype.kind in "cmM":
            raise TypeError
        if values.dtype.kind == "O":
            values = np.where(pd.isna(values), np.nan, values)
        return values.astype(np.float64)
    except (TypeError, ValueError):
        msg = (
            f"{where} is an array of {values.dtype} and holds values that are no real numbers; coordinates must be "
            "numbers, with a column for each axis"
        )
        raise ValueError(msg) from None


def _where_coordinates_are(adata: AnnData, basis: str) -> str:
    """Name columns of ``obs`` and keys of ``obsm`` that look like coordinates, and how to use them."""
    numbers = {str(c) for c in adata.obs.columns if pd.api.types.is_numeric_dtype(adata.obs[c])}
    pairs = []
    for x in map(str, adata.obs.columns):
        for one, other in (("x", "y"), ("X", "Y"), ("col", "row")):
            for at in range(len(x)):
                y = x[:at] + other + x[at + len(one) :]
                if x[at : at + len(one)] == one and {x, y} <= numbers and [x, y] not in pairs:
                    pairs.append([x, y])
    found = [f"adata.obsm[{basis!r}] = adata.obs[{pair}].to_numpy()" for pair in pairs]
    hint = f"obs may hold them: {', or '.join(found[:4])}. " if found else ""
    keys = [k for k in adata.obsm if np.ndim(adata.obsm[k]) == 2 and adata.obsm[k].shape[1] in (2, 3)]
    keys = [k for k in keys if "spatial" in k.lower() or "coord" in k.lower()] or keys
    return f"{hint}obsm holds {list(adata.obsm)}" + (f"; name one with basis=, such as {keys[0]!r}" if keys else "")


def get_obs_labels(adata: AnnData, key: str, *, name: str) -> pd.Categorical:
    """Read ``obs[key]`` as a categorical of strings without unused categories; missing values stay.

    ``name`` is the argument, for messages.
    """
    if key not in adata.obs:
        msg = f"{name}={key!r} is not a column of adata.obs; it holds {list(adata.obs.columns)}"
        raise KeyError(msg)
    labels = as_labels(get_column(adata.obs, key)).remove_unused_categories()
    check_text(f"obs[{key!r}]", labels.categories)
    return labels


def by_name(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Convert the keys of a mapping to text, as labels are; bytes become text."""
    return dict(zip(label_texts(map(_decoded, values)), map(_decoded, values.values()), strict=True))


def _decoded(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def stored_colors(adata: AnnData, key: str) -> dict[str, Any]:
    """Read the colour of each category of ``obs[key]`` from ``uns["<key>_colors"]``; empty where there are too few.

    They may be a mapping, or a list in the order of the categories, as text or bytes.
    """
    stored = adata.uns.get(f"{key}_colors")
    if stored is None or key not in adata.obs:
        return {}
    if isinstance(stored, Mapping):
        return by_name(stored)
    values = [stored] if isinstance(stored, str | bytes) else list(stored)
    column = get_column(adata.obs, key)
    given = isinstance(column.dtype, pd.CategoricalDtype)
    names = column.cat.categories if given else as_labels(column).categories
    return by_name(dict(zip(names, values, strict=False))) if len(values) >= len(names) else {}


def get_known_labels(adata: AnnData, key: str, *, name: str, effect: str) -> pd.Categorical:
    """Read labels as :func:`get_obs_labels` does, with a warning of missing ones and their ``effect``."""
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
    """Read labels as :func:`get_obs_labels` does; a missing value is an error."""
    values = get_obs_labels(adata, key, name=name)
    n_missing = int((values.codes < 0).sum())
    if n_missing:
        msg = (
            f"{name}={key!r}: obs[{key!r}] has no value for {n_missing} of {adata.n_obs} cells; fill or drop them first"
        )
        raise ValueError(msg)
    return values


def get_libraries(adata: AnnData, library_key: str | None) -> list[tuple[str, np.ndarray]]:
    """Read the slides as ``[(name, rows)]``; one slide named ``""`` where ``library_key`` is None."""
    if library_key is None:
        return [("", np.arange(adata.n_obs))]
    values = get_obs_categories(adata, library_key, name="library_key")
    return [(str(c), np.flatnonzero(values.codes == i)) for i, c in enumerate(values.categories)]


def slide_codes(libraries: list[tuple[str, np.ndarray]]) -> np.ndarray:
    """Give the number of each cell's slide, (n_obs,), by name, so that results do not depend on which comes first."""
    codes = np.empty(sum(len(rows) for _, rows in libraries), np.int64)
    for k, (_, rows) in enumerate(sorted(libraries, key=lambda library: library[0])):
        codes[rows] = k
    return codes


def check_within_slides(
    adata: AnnData, graph: Any, slide: np.ndarray, library_key: str | None, neighbors_key: str
) -> None:
    """Raise where the tissue graph joins cells of different slides."""
    if library_key is None:
        return
    i, j = graph.nonzero()
    n_across = int((slide[i] != slide[j]).sum())
    if n_across:
        params = graph_params(adata, neighbors_key)
        earlier = f"library_key={params['library_key']!r}" if "library_key" in params else "no library_key"
        origin = (
            f" It was built with {earlier}, by sfm.pp.spatial_neighbors or on the way." if "method" in params else ""
        )
        own = neighbors_key.removesuffix("_neighbors")
        key_added = "" if own == "spatial" else f", key_added={own!r}"
        msg = (
            f"the tissue graph of uns[{neighbors_key!r}] has {n_across} edges between slides of "
            f"obs[{library_key!r}].{origin} Build it again with "
            f"sfm.pp.spatial_neighbors(adata, library_key={library_key!r}{key_added}), and repeat what was computed "
            "on it"
        )
        raise ValueError(msg)


def graph_params(adata: AnnData, neighbors_key: str) -> Mapping[str, Any]:
    """Read ``params`` of a tissue graph; those of :func:`spatialfm.pp.spatial_neighbors` have a ``method``."""
    entry = adata.uns.get(neighbors_key)
    params = entry.get("params") if isinstance(entry, Mapping) else None
    return params if isinstance(params, Mapping) else {}


def graph_record(adata: AnnData, neighbors_key: str, basis: str) -> Mapping[str, Any]:
    """Read ``uns[neighbors_key]``, or make it for a graph under the usual keys of ``obsp`` that lacks it."""
    entry: Any = adata.uns.get(neighbors_key)
    if entry is None and neighbors_key == "spatial_neighbors" and "spatial_connectivities" in adata.obsp:
        entry = {"connectivities_key": "spatial_connectivities", "params": {"basis": basis, "guessed": "the record"}}
        if "spatial_distances" in adata.obsp:
            entry["distances_key"] = "spatial_distances"
    keys = [entry.get(f"{kind}_key") for kind in ("connectivities", "distances")] if isinstance(entry, Mapping) else []
    if not keys or keys[0] not in adata.obsp or (keys[1] is not None and keys[1] not in adata.obsp):
        msg = (
            f"neighbors_key={neighbors_key!r}: there is no tissue graph in adata.uns[{neighbors_key!r}] and "
            "adata.obsp; "
            "build one with sfm.pp.spatial_neighbors(adata, library_key=...)"
        )
        raise KeyError(msg)
    return entry


def get_graph(
    adata: AnnData, neighbors_key: str = "spatial_neighbors", basis: str = "spatial"
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Read connectivities and distances of the tissue graph that ``uns[neighbors_key]`` names, as csr with equal edges.

    Copies, without the diagonal. A graph that holds no lengths gets those of the coordinates in ``obsm[basis]``; one
    whose lengths do not fit its coordinates is an error.
    """
    entry = graph_record(adata, neighbors_key, basis)
    if neighbors_key not in adata.uns:
        warn(
            "obsp['spatial_connectivities'] is used as the tissue graph although its record uns['spatial_neighbors'] "
            "is missing (ad.concat(pairwise=True) loses it); to build another call "
            "sfm.pp.spatial_neighbors(adata, library_key=...)"
        )
    graph = _edges(adata, entry["connectivities_key"])
    graph.eliminate_zeros()
    params = graph_params(adata, neighbors_key)
    basis = str(params["basis"]) if str(params.get("basis")) in adata.obsm else basis
    i = np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr))
    if entry.get("distances_key") is None:
        xy = get_coordinates(adata, basis) if basis in adata.obsm else np.full((adata.n_obs, 1), np.nan)
        lengths = np.linalg.norm(xy[i] - xy[graph.indices], axis=1)
    else:
        stored = _edges(adata, entry["distances_key"])
        same = np.array_equal(stored.indptr, graph.indptr) and np.array_equal(stored.indices, graph.indices)
        lengths = stored.data if same else np.asarray(stored[i, graph.indices]).ravel()
        if basis in adata.obsm:
            _check_lengths(adata, lengths, i, graph.indices, basis, neighbors_key)
    distances = sparse.csr_matrix((lengths.astype(np.float32), graph.indices.copy(), graph.indptr.copy()), graph.shape)
    return graph, distances


def _edges(adata: AnnData, key: str) -> sparse.csr_matrix:
    """Copy ``obsp[key]`` as a csr without repeated entries and without the diagonal; other zeros stay."""
    values = in_memory(adata.obsp[key])
    entries = sparse.coo_matrix(values.to_numpy() if isinstance(values, pd.DataFrame) else values)
    if entries.dtype.kind not in "biuf" or not np.isfinite(entries.data).all() or (entries.data < 0).any():
        msg = (
            f"obsp[{key!r}] holds values that are NaN, infinite, negative or no numbers; it must hold edges of a "
            "tissue graph"
        )
        raise ValueError(msg)
    off = entries.row != entries.col
    weights = entries.data[off].astype(np.float32 if entries.dtype.kind == "b" else entries.dtype)
    matrix = sparse.csr_matrix((weights, (entries.row[off], entries.col[off])), shape=entries.shape)
    matrix.sum_duplicates()
    return matrix


def _check_lengths(
    adata: AnnData, stored: np.ndarray, i: np.ndarray, j: np.ndarray, basis: str, neighbors_key: str
) -> None:
    """Raise where lengths of edges do not fit the coordinates, up to a factor for each slide: these were replaced."""
    xy = get_coordinates(adata, basis)
    params = graph_params(adata, neighbors_key)
    step = max(1, len(stored) // _MAX_LENGTHS)
    i, j, stored = i[::step], j[::step], stored[::step].astype(np.float64)
    slack = 0.25
    grid = params.get("coord_type") == "grid"
    if not len(stored) or ("method" not in params and not grid and stored.min() == stored.max()):
        return  # ones instead of lengths
    if grid and "method" not in params and (stored == np.round(stored)).all():
        # squidpy counts steps on the lattice
        one = stored == stored.min()
        i, j, stored, slack = i[one], j[one], stored[one], 0.5
    now = np.linalg.norm(xy[i] - xy[j], axis=1)
    slides = str(params.get("library_key", ""))
    codes = as_labels(get_column(adata.obs, slides)).codes if slides in adata.obs else np.zeros(adata.n_obs, int)
    off = np.zeros(len(now), bool)
    for k in np.unique(codes[i]):
        rows = (codes[i] == k) & (stored > 0)
        if rows.any():
            scaled = stored[rows] * np.median(now[rows] / stored[rows])
            off[rows] = np.abs(now[rows] - scaled) > slack * np.maximum(scaled, np.median(scaled))
            off[rows] |= not scaled.any()
    if off.mean() > _MAX_STALE:
        msg = (
            f"{off.mean():.0%} of the edges of uns[{neighbors_key!r}] are not as long as obsm[{basis!r}] says (median "
            f"{np.median(stored):.4g} when it was built, {np.median(now):.4g} now): the coordinates were replaced "
            "after it was built. Build it again with sfm.pp.spatial_neighbors(adata, library_key=...); if it was built "
            "on other coordinates, name them: "
            f"adata.uns[{neighbors_key!r}]['params'] = {{'basis': ...}}"
        )
        raise ValueError(msg)


def get_result(adata: AnnData, key: str, call: str, *, default: str, field: str) -> Mapping[str, Any]:
    """Read ``uns[key]`` that ``call`` wrote, such as ``"tl.annotate(adata, ...)"``, with ``key_added=default``.

    ``field`` is a key by which such a result is recognised.
    """
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
    """Return what a function writes to: ``adata``, also if it was a view, or a copy in memory."""
    if not copy and not adata.is_view:
        return adata
    own = adata.to_memory() if adata.isbacked else adata.copy()
    if copy:
        return own
    adata._init_as_actual(own)
    return adata
