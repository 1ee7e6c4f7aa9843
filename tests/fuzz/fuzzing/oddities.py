"""Oddities of an AnnData by name, such as ``"X in csc"``, so that failures can be read and kept as examples."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData

# Layouts of the same numbers: results must not change.
SAME: dict[str, Callable[[AnnData], Any]] = {}
# Anything else: a call returns a result, or raises a clear error.
ODD: dict[str, Callable[[AnnData], Any]] = {}
# Oddities with NaN or infinite values, so that results may have them too.
NOT_FINITE: set[str] = set()


def apply(adata: AnnData, names: Any) -> AnnData:
    """Apply oddities to ``adata`` in the order of the names; those that are no longer possible are left out."""
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                changed = {**SAME, **ODD}[name](adata)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError, OverflowError):
            continue  # anndata or numpy cannot hold this
        adata = adata if changed is None else changed
    return adata


def _same(name: str) -> Callable[..., Any]:
    return lambda change: SAME.setdefault(name, change)


def _odd(name: str, *, finite: bool = True) -> Callable[..., Any]:
    if not finite:
        NOT_FINITE.add(name)
    return lambda change: ODD.setdefault(name, change)


def _dense(adata: AnnData) -> np.ndarray:
    x = adata.X
    return x.toarray() if sp.issparse(x) else np.array(x)


def _set_x(adata: AnnData, x: Any) -> None:
    """Set ``adata.X``, in a function so that it can be used in a lambda; the type of ``x`` is not checked."""
    adata.X = x


# --- the same numbers -----------------------------------------------------------------------------


def _repeated(adata: AnnData) -> sp.csr_matrix:
    """Csr with every entry split into two, in random order."""
    x = sp.csr_matrix(_dense(adata)).tocoo()
    part = np.floor(x.data / 2)
    data, row, column = np.r_[part, x.data - part], np.r_[x.row, x.row], np.r_[x.col, x.col]
    order = np.lexsort((np.random.default_rng(0).random(len(data)), row))
    indptr = np.r_[0, np.cumsum(np.bincount(row, minlength=x.shape[0]))]
    return sp.csr_matrix((data[order].astype(x.dtype), column[order], indptr), shape=x.shape)


def _with_zeros(adata: AnnData) -> sp.csr_matrix:
    """Csr with stored zeros."""
    x = sp.csr_matrix(np.ones(adata.shape, np.float32))
    x.data[:] = _dense(adata).ravel()
    return x


def _long_indices(adata: AnnData) -> sp.csr_matrix:
    x = sp.csr_matrix(_dense(adata))
    x.indices, x.indptr = x.indices.astype(np.int64), x.indptr.astype(np.int64)
    return x


def _read_only(adata: AnnData) -> np.ndarray:
    x = _dense(adata)
    x.setflags(write=False)
    return x


def _read_only_csr(adata: AnnData) -> sp.csr_matrix:
    x = sp.csr_matrix(_dense(adata))
    for part in (x.data, x.indices, x.indptr):
        part.setflags(write=False)
    return x


def _strided(adata: AnnData) -> np.ndarray:
    x = _dense(adata)
    return np.repeat(np.repeat(x, 2, axis=0), 2, axis=1)[::2, ::2]


def _dask(adata: AnnData, *, sparse: bool = False) -> Any:
    import dask.array as da

    x = da.from_array(_dense(adata), chunks=(max(1, adata.n_obs // 3), -1))
    return x.map_blocks(sp.csr_matrix) if sparse else x


for _name, _change in {
    "X in C order": lambda adata: _set_x(adata, np.ascontiguousarray(_dense(adata))),
    "X in Fortran order": lambda adata: _set_x(adata, np.asfortranarray(_dense(adata))),
    "X strided": lambda adata: _set_x(adata, _strided(adata)),
    "X in csc": lambda adata: _set_x(adata, sp.csc_matrix(_dense(adata))),
    "X in csr_array": lambda adata: _set_x(adata, sp.csr_array(_dense(adata))),
    "X in csc_array": lambda adata: _set_x(adata, sp.csc_array(_dense(adata))),
    "X in csr with repeated entries": lambda adata: _set_x(adata, _repeated(adata)),
    "X in csc with repeated entries": lambda adata: _set_x(adata, _repeated(adata.T).T),
    "X in csr with stored zeros": lambda adata: _set_x(adata, _with_zeros(adata)),
    "X in csr with long indices": lambda adata: _set_x(adata, _long_indices(adata)),
    "X read-only": lambda adata: _set_x(adata, _read_only(adata)),
    "X in read-only csr": lambda adata: _set_x(adata, _read_only_csr(adata)),
    "X in dask": lambda adata: _set_x(adata, _dask(adata)),
    "X in dask of csr": lambda adata: _set_x(adata, _dask(adata, sparse=True)),
    **{
        f"X of {dtype}": lambda adata, dtype=dtype: _set_x(adata, adata.X.astype(dtype))
        for dtype in ("float64", "int32", "int64", "uint8", "uint16", "uint64")
    },
    "X of the other byte order": lambda adata: _set_x(adata, _dense(adata).astype(">f4")),
    "X of float16": lambda adata: _set_x(adata, _dense(adata).astype(np.float16)),
    "X masked, nothing hidden": lambda adata: _set_x(adata, np.ma.MaskedArray(_dense(adata))),
}.items():
    _same(_name)(_change)


@_same("a view")
def _(adata: AnnData) -> AnnData:
    return adata[np.arange(adata.n_obs)]


@_same("backed")
def _(adata: AnnData) -> AnnData:
    path = Path(tempfile.mkdtemp()) / "backed.h5ad"
    adata.write_h5ad(path)
    return ad.read_h5ad(path, backed="r")


@_same("read lazily")
def _(adata: AnnData) -> AnnData:
    path = Path(tempfile.mkdtemp()) / "lazy.zarr"
    adata.write_zarr(path)
    return ad.experimental.read_lazy(path)


@_same("coordinates of float32")
def _(adata: AnnData) -> None:
    adata.obsm["spatial"] = adata.obsm["spatial"].astype(np.float32)


@_same("labels as text")
def _(adata: AnnData) -> None:
    for column in adata.obs.select_dtypes("category"):
        adata.obs[column] = adata.obs[column].astype(object)


@_same("unused categories")
def _(adata: AnnData) -> None:
    for column in adata.obs.select_dtypes("category"):
        adata.obs[column] = adata.obs[column].cat.add_categories(["not there"])


@_same("raw")
def _(adata: AnnData) -> None:
    adata.raw = adata.copy()


# --- values -----------------------------------------------------------------------------


def _values(change: Callable[[np.ndarray], Any]) -> Callable[[AnnData], None]:
    return lambda adata: _set_x(adata, change(_dense(adata)))


def _with(value: Any) -> Callable[[np.ndarray], np.ndarray]:
    def change(x: np.ndarray) -> np.ndarray:
        x = np.array(x, dtype=np.float64)
        x[:: max(1, len(x) // 3), 0] = value
        return x

    return change


def _masked(x: np.ndarray) -> np.ma.MaskedArray:
    mask = np.zeros(x.shape, bool)
    mask[:3, 0] = True
    return np.ma.MaskedArray(x, mask)


def _texts(x: np.ndarray) -> np.ndarray:
    x = x.astype(object)
    x[0, 0] = "much"
    return x


for _name, _change in {
    "values logged": np.log1p,
    "values scaled": lambda x: (x - x.mean(0)) / (x.std(0) + 1),
    "values intensities": lambda x: x * 117.3 + np.random.default_rng(0).random(x.shape) * 50,
    "values zero": np.zeros_like,
    "values constant": np.ones_like,
    "values huge": lambda x: x.astype(np.float64) * 1e300,
    "values beyond float32": lambda x: x.astype(np.float64) * 1e38,
    "values large": lambda x: x.astype(np.float64) * 1e15,
    "values tiny": lambda x: x.astype(np.float64) * 1e-300,
    "values subnormal in float32": lambda x: x * np.float32(1e-40),
    "values negative": lambda x: -x,
    "one value negative": _with(-1),
    "X bool": lambda x: x > 1,
    "X complex": lambda x: x + 1j,
    "X object": lambda x: x.astype(object),
    "X text": _texts,
    "X masked": _masked,
    "X int8": lambda x: x.astype(np.int8),
    "X longdouble": lambda x: x.astype(np.longdouble),
    "X float16 large": lambda x: np.minimum(x * 1e4, 6e4).astype(np.float16),
    "X datetime": lambda x: x.astype("datetime64[s]"),
    "a cell without counts": lambda x: x * (np.arange(len(x)) > 0)[:, None],
    "a gene without counts": lambda x: x * (np.arange(x.shape[1]) > 0),
}.items():
    _odd(_name)(_values(_change))
for _name, _value in {"a value NaN": np.nan, "a value infinite": np.inf}.items():
    _odd(_name, finite=False)(_values(_with(_value)))


@_odd("no X")
def _(adata: AnnData) -> None:
    adata.X = None


# --- shapes -----------------------------------------------------------------------------

for _n in (0, 1, 2, 3, 7):
    _odd(f"{_n} cells")(lambda adata, n=_n: adata[np.linspace(0, adata.n_obs - 1, n).astype(int)].copy())
    _odd(f"{_n} genes")(lambda adata, n=_n: adata[:, :n].copy())
_odd("cells of one sample")(lambda adata: adata[adata.obs["sample"].astype(str) == "s1"].copy())
_odd("cells of one type")(lambda adata: adata[adata.obs["cell_type"].astype(str) == "B cell"].copy())
_odd("every cell twice")(lambda adata: adata[np.repeat(np.arange(adata.n_obs), 2)].copy())
_odd("a sample of one cell")(
    lambda adata: adata[(adata.obs["sample"].astype(str) != "s1") | (np.arange(adata.n_obs) == 0)].copy()
)


# --- names -----------------------------------------------------------------------------

ODD_TEXTS = [
    "",
    " ",
    "nan",
    "None",
    "_index",
    "a/b",
    "/",
    "..",
    "ä µ 細胞",
    "x" * 300,
    "-1",
    "0",
    "True",
    "a\nb",
    "%s",
    "{}",
    "$x_1$",
]


def _renamed(axis: str, change: Callable[[list[str]], list[Any]]) -> Callable[[AnnData], None]:
    def rename(adata: AnnData) -> None:
        setattr(adata, f"{axis}_names", pd.Index(change(list(getattr(adata, f"{axis}_names")))))

    return rename


for _axis in ("obs", "var"):
    for _name, _change in {
        "the same": lambda names: ["same"] * len(names),
        "twice": lambda names: [names[i // 2] for i in range(len(names))],
        "odd": lambda names: [*ODD_TEXTS, *names][: len(names)],
        "with NUL": lambda names: [f"{name}\0" for name in names],
        "whole numbers": lambda names: [str(i) for i in range(len(names))],
    }.items():
        _odd(f"{_axis}_names {_name}")(_renamed(_axis, _change))


# --- labels -----------------------------------------------------------------------------


def _labels(column: str, change: Callable[[pd.Series], Any]) -> Callable[[AnnData], None]:
    def relabel(adata: AnnData) -> None:
        adata.obs[column] = change(adata.obs[column])

    return relabel


def _first(values: pd.Series, value: Any) -> pd.Series:
    values = values.astype(object)
    values.iloc[: max(1, len(values) // 8)] = value
    return values


def _per_label(values: pd.Series, texts: list[Any]) -> np.ndarray:
    codes = pd.factorize(values.astype(str), sort=True)[0]
    out = np.empty(len(codes), dtype=object)
    for i, code in enumerate(codes):
        out[i] = texts[code % len(texts)]
    return out


_LABELS: dict[str, Callable[[pd.Series], Any]] = {
    "missing in some": lambda v: _first(v, np.nan),
    "missing as None": lambda v: _first(v, None),
    "missing as NA in text": lambda v: _first(v, pd.NA).astype("string"),
    "missing in all": lambda v: pd.Series(np.nan, index=v.index),
    "empty text": lambda v: _first(v, ""),
    "the text nan": lambda v: _first(v, "nan"),
    "the text unsure": lambda v: _first(v, "unsure"),
    "numbers": lambda v: pd.factorize(v.astype(str), sort=True)[0],
    "numbers of float": lambda v: pd.factorize(v.astype(str), sort=True)[0] / 2,
    "numbers with NaN": lambda v: pd.Series(pd.factorize(v.astype(str))[0], index=v.index).where(np.arange(len(v)) > 3),
    "numbers as categories": lambda v: pd.Categorical(pd.factorize(v.astype(str), sort=True)[0]),
    "bool": lambda v: pd.factorize(v.astype(str), sort=True)[0] > 0,
    "nullable bool": lambda v: pd.array(pd.factorize(v.astype(str), sort=True)[0] > 0, dtype="boolean"),
    "nullable whole numbers": lambda v: pd.array(pd.factorize(v.astype(str), sort=True)[0], dtype="Int64"),
    "mixed": lambda v: _per_label(v, [1, "1", 1.5, None]),
    "with slashes": lambda v: _per_label(v, ["a/b", "/", "a//b", "a/"]),
    "dots": lambda v: _per_label(v, [".", "..", "...", "a.b"]),
    "_index": lambda v: _per_label(v, ["_index", "index", "b", "c"]),
    "with NUL": lambda v: _per_label(v, ["a\0", "b\0c", "\0", "d"]),
    "alike but for NUL": lambda v: _per_label(v, ["a", "a\0", "b", "b\0"]),
    "unicode": lambda v: _per_label(v, ["ä", "a\u0308", "細胞", "\U0001f9ec"]),
    "spaces": lambda v: _per_label(v, ["a", "a ", " a", " "]),
    "letters of either case": lambda v: _per_label(v, ["a", "A", "b", "B"]),
    "long": lambda v: _per_label(v, ["x" * 300, "y" * 300, "z", "w"]),
    "formats": lambda v: _per_label(v, ["%s", "{0}", "$x_1$", "$"]),
    "arrows": lambda v: _per_label(v, ["a → b", "a|b", "a,b", "a;b"]),
    "constant": lambda v: np.repeat("only", len(v)),
    "each cell its own": lambda v: [f"c{i}" for i in range(len(v))],
    "dates": lambda v: pd.to_datetime(pd.factorize(v.astype(str), sort=True)[0], unit="D"),
    "lists": lambda v: pd.Series([[1]] * len(v), index=v.index),
    "tuples": lambda v: pd.Series([(1, 2)] * len(v), index=v.index),
    "bytes": lambda v: _per_label(v, [b"a", b"b", b"c", b"d"]),
    "complex": lambda v: pd.factorize(v.astype(str))[0] * 1j,
    "intervals": lambda v: pd.cut(pd.Series(np.arange(len(v)) % 4, index=v.index), 4),
    "ordered": lambda v: v.astype("category").cat.as_ordered(),
}
LABEL_COLUMNS = ("cell_type", "sample", "condition", "niche", "marks", "patient")
for _column in LABEL_COLUMNS:
    for _name, _change in _LABELS.items():
        _odd(f"{_column}: {_name}")(_labels(_column, _change))


@_odd("a column named by a number")
def _(adata: AnnData) -> None:
    adata.obs[0] = 1.0


@_odd("a column named by a pair")
def _(adata: AnnData) -> None:
    adata.obs[("a", "b")] = 1.0


@_odd("two columns of one name")
def _(adata: AnnData) -> None:
    twice = pd.concat([adata.obs, adata.obs[["cell_type"]]], axis=1)
    adata.obs = twice


# --- coordinates -----------------------------------------------------------------------------


def _coordinates(change: Callable[[np.ndarray], Any]) -> Callable[[AnnData], None]:
    def move(adata: AnnData) -> None:
        adata.obsm["spatial"] = change(np.array(adata.obsm["spatial"]))

    return move


def _far(xy: np.ndarray) -> np.ndarray:
    xy[:1] = 1e12
    return xy


def _first_row(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(xy: np.ndarray) -> np.ndarray:
        xy[:1] = value
        return xy

    return change


for _name, _change in {
    "all in one place": np.zeros_like,
    "pairs in one place": lambda xy: np.repeat(xy[::2], 2, axis=0)[: len(xy)],
    "on a line": lambda xy: xy * [1, 0],
    "on a slanted line": lambda xy: np.c_[xy[:, 0], xy[:, 0] * 0.3],
    "on a lattice": lambda xy: np.c_[np.arange(len(xy)) % 5, np.arange(len(xy)) // 5].astype(float),
    "huge": lambda xy: xy * 1e150,
    "beyond float32": lambda xy: xy * 1e38,
    "very huge": lambda xy: xy * 1e306,
    "tiny": lambda xy: xy * 1e-300,
    "small": lambda xy: xy * 1e-12,
    "negative": lambda xy: -xy,
    "far from the origin": lambda xy: xy + 1e9,
    "a cell far away": _far,
    "whole": lambda xy: xy.astype(np.int64),
    "unsigned": lambda xy: xy.astype(np.uint8),
    "of float16": lambda xy: xy.astype(np.float16),
    "of three columns": lambda xy: np.c_[xy, np.ones(len(xy))],
    "of one column": lambda xy: xy[:, :1],
    "of no columns": lambda xy: xy[:, :0],
    "of text": lambda xy: xy.astype(str).astype(object),
    "complex": lambda xy: xy + 1j,
    "masked": lambda xy: np.ma.MaskedArray(xy, xy < 8),
    "sparse": sp.csr_matrix,
    "in Fortran order": np.asfortranarray,
    "bool": lambda xy: xy > 30,
}.items():
    _odd(f"coordinates {_name}")(_coordinates(_change))
for _name, _value in {"NaN": np.nan, "infinite": np.inf}.items():
    _odd(f"a coordinate {_name}", finite=False)(_coordinates(_first_row(_value)))


@_odd("no coordinates")
def _(adata: AnnData) -> None:
    del adata.obsm["spatial"]


@_odd("coordinates in a DataFrame")
def _(adata: AnnData) -> None:
    adata.obsm["spatial"] = pd.DataFrame(adata.obsm["spatial"], index=adata.obs_names, columns=["x", "y"])


@_odd("coordinates in a nullable DataFrame")
def _(adata: AnnData) -> None:
    table = pd.DataFrame(adata.obsm["spatial"], index=adata.obs_names, columns=["x", "y"]).astype("Float64")
    table.iloc[0, 0] = pd.NA
    adata.obsm["spatial"] = table


# --- fields that spatialfm reads -----------------------------------------------------------------------------

for _key in ("spatial_neighbors", "grn", "spatial", "embeddings", "spatialfm", "image_features"):
    for _name, _value in {"empty": {}, "a text": "text", "a list": [1, 2], "a number": 3, "None": None}.items():
        _odd(f"uns[{_key!r}] {_name}")(lambda adata, key=_key, value=_value: adata.uns.__setitem__(key, value))


@_odd("a graph of self-loops")
def _(adata: AnnData) -> None:
    graph = sp.identity(adata.n_obs, format="csr", dtype=np.float32)
    adata.obsp["spatial_connectivities"] = adata.obsp["spatial_distances"] = graph
    adata.uns["spatial_neighbors"] = {
        "connectivities_key": "spatial_connectivities", "distances_key": "spatial_distances", "params": {}
    }  # fmt: skip


@_odd("a graph of NaN", finite=False)
def _(adata: AnnData) -> None:
    ODD["a graph of self-loops"](adata)
    adata.obsp["spatial_connectivities"] = adata.obsp["spatial_connectivities"] * np.float32(np.nan)


@_odd("a dense graph")
def _(adata: AnnData) -> None:
    ODD["a graph of self-loops"](adata)
    adata.obsp["spatial_connectivities"] = np.ones((adata.n_obs, adata.n_obs))


@_odd("a graph without edges")
def _(adata: AnnData) -> None:
    ODD["a graph of self-loops"](adata)
    adata.obsp["spatial_connectivities"] = sp.csr_matrix((adata.n_obs, adata.n_obs))
    adata.obsp["spatial_distances"] = sp.csr_matrix((adata.n_obs, adata.n_obs))


@_odd("embeddings of float16")
def _(adata: AnnData) -> None:
    _embeddings(adata, lambda rep: rep.astype(np.float16))


@_odd("embeddings with NaN", finite=False)
def _(adata: AnnData) -> None:
    _embeddings(adata, lambda rep: rep * np.float32(np.nan))


@_odd("embeddings constant")
def _(adata: AnnData) -> None:
    _embeddings(adata, np.ones_like)


@_odd("embeddings huge")
def _(adata: AnnData) -> None:
    _embeddings(adata, lambda rep: rep.astype(np.float64) * 1e200)


@_odd("embeddings in a DataFrame")
def _(adata: AnnData) -> None:
    _embeddings(adata, lambda rep: pd.DataFrame(rep, index=adata.obs_names))


@_odd("embeddings of one column")
def _(adata: AnnData) -> None:
    _embeddings(adata, lambda rep: rep[:, :1])


@_odd("embeddings of whole numbers")
def _(adata: AnnData) -> None:
    _embeddings(adata, lambda rep: np.round(rep * 10).astype(int))


def _embeddings(adata: AnnData, change: Callable[[np.ndarray], Any]) -> None:
    for key in [key for key in adata.obsm if key != "spatial" and not isinstance(adata.obsm[key], pd.DataFrame)]:
        adata.obsm[key] = change(np.asarray(adata.obsm[key]))
