"""Find slides that overlap in one coordinate system, as after a concatenation, and the column that names them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from spatialfm._data._adata import get_column, get_table
from spatialfm._data._images import image_entries

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anndata import AnnData

MAX_CELLS = 20_000
"""Largest number of cells that are examined, with all their neighbours; a sample where there are more."""
MAX_CATEGORIES = 500
_N_NEIGHBORS, _N_FEW = 32, 2_000
_MIN_PAIRS, _MIN_DEVIATION = 10, 4
_MIN_INSIDE, _MIN_COVERED = 1 / 3, 0.1
"""Smallest share of cells inside the outline of another category, of one category and of all cells.

Fields of view may overlap a little.
"""
# Number of pairs at half the usual distance, relative to chance: 1 for independent slides, at most a third within one
# slide; within one category of overlapping slides at most a half (irregular segmentations), usually below a twentieth.
_MIN_ACROSS, _MAX_WITHIN = 0.6, 0.65
_MAX_UNEVEN = 0.2
"""Largest difference between the quartiles of the distance to the nearest spot of a lattice; for cells it is 0.4."""
_MAX_LATTICE = 0.65
"""Distance to the nearest spot of an overlapping lattice, in pitches: at most 0.58 if hexagonal, 0.71 if square."""


class Overlap(NamedTuple):
    """Categories that overlap."""

    column: str
    """Such as ``obs['slide']``."""
    fix: str
    """What to pass as ``library_key``, and what to do before."""
    others: list[str]
    """Other columns that distinguish the slides, or parts of them."""
    codes: np.ndarray
    """(n_obs,) category of each cell, -1 where missing."""
    reason: str

    def message(self) -> str:
        """Describe what was found, and the fix."""
        others = f" ({', '.join(self.others)} may name them too)" if self.others else ""
        return f"{self.column} names several overlapping slides{others}: {self.reason}. Pass {self.fix}"


class _Column(NamedTuple):
    name: str
    fix: str
    codes: np.ndarray


def find_overlap(adata: AnnData, xy: np.ndarray, libraries: Sequence[tuple[str, np.ndarray]]) -> Overlap | None:
    """Find a column whose categories are overlapping slides within one of ``libraries``.

    Cells have a size, so in one slide no two cells come closer than that. Where slides overlap, cells of one slide
    still keep this distance, but cells of different slides are as close as chance makes them. The same holds for spots
    on lattices, whose nearest neighbour is then nearer than the pitch. At most 20,000 cells are examined, in linear
    time.
    """
    columns = list(_columns(adata))
    pictured = _of_images(adata, columns, libraries)
    if pictured is not None:
        return pictured
    generator = np.random.default_rng(0)
    budget = max(MAX_CELLS // len(libraries), 500)
    for _, rows in libraries:
        if len(rows) < 4 * _MIN_PAIRS:
            continue
        drawn = np.arange(len(rows))
        if len(rows) > budget:
            drawn = np.sort(generator.choice(len(rows), budget, replace=False))
        around = _Surroundings(xy[rows], drawn)
        scores = {c.name: s for c in columns if (s := around.score(c.codes[rows])) is not None}
        if scores:
            best = min(scores.values())
            alike = [c for c in columns if scores.get(c.name, np.inf) <= best + 0.05]
            found = min(alike, key=lambda c: len(np.unique(c.codes[rows])))
            reason = "cells of its categories overlap, much closer to each other than cells of one category are"
            finer = [c.name for c in alike if c is not found and _is_finer(c.codes, found.codes)]
            return Overlap(found.name, found.fix, finer, found.codes, reason)
    return None


def _columns(adata: AnnData) -> Iterator[_Column]:
    """Yield columns with few values, and the ends and beginnings of the names of the cells."""
    probe = np.unique(np.linspace(0, adata.n_obs - 1, min(adata.n_obs, 2_000)).astype(int))
    obs = get_table(adata.obs)
    for position, name in enumerate(obs):
        values = obs.iloc[:, position]
        if not isinstance(values.dtype, pd.CategoricalDtype):
            try:
                if values.iloc[probe].nunique() > MAX_CATEGORIES:
                    continue
            except TypeError:  # lists and the like
                continue
        yield from _few(f"obs[{name!r}]", f"library_key={name!r}", values)
    names = adata.obs_names.astype(str)
    for split, part, which in (("rsplit", -1, "end"), ("split", 0, "beginning")):
        for mark in "-_":
            parts = getattr(names[probe].str, split)(mark, n=1).str[part]
            if 1 < parts.nunique() <= min(MAX_CATEGORIES, len(probe) // 10):
                how = f"adata.obs['slide'] = adata.obs_names.str.{split}({mark!r}, n=1).str[{part}]"
                values = pd.Series(getattr(names.str, split)(mark, n=1).str[part])
                yield from _few(f"the {which} of obs_names", f"library_key='slide' after {how}", values)


def _few(name: str, fix: str, values: pd.Series) -> Iterator[_Column]:
    codes, found = pd.factorize(values)
    if 1 < len(found) <= min(MAX_CATEGORIES, len(codes) // 10):
        yield _Column(name, fix, codes)


def _is_finer(codes: np.ndarray, than: np.ndarray) -> bool:
    pairs = np.unique(np.stack([codes, than]), axis=1)
    return len(np.unique(pairs[0])) == pairs.shape[1]


def _of_images(
    adata: AnnData, columns: Sequence[_Column], libraries: Sequence[tuple[str, np.ndarray]]
) -> Overlap | None:
    """Find slides with their own images: a column that holds the names in ``uns["spatial"]``."""
    names = set(image_entries(adata))
    if len(names) < 2:
        return None
    for column in columns:
        if not column.name.startswith("obs["):
            continue
        values = get_column(adata.obs, column.name[5:-2])
        known = values.astype(str).isin(names).to_numpy()
        for _, rows in libraries:
            if known[rows].all() and len(np.unique(column.codes[rows])) > 1:
                reason = "it names several slides with images in uns['spatial'], and each has its own coordinates"
                return Overlap(column.name, column.fix, [], column.codes, reason)
    return None


class _Surroundings:
    """Nearest cells of the cells that were drawn."""

    def __init__(self, xy: np.ndarray, drawn: np.ndarray) -> None:
        n, self.n_dims = xy.shape
        k = min(_N_NEIGHBORS, n - 1)
        distances, near = cKDTree(xy, balanced_tree=False).query(xy[drawn], k=k + 1)
        own = near == drawn[:, None]
        own[~own.any(axis=1), -1] = True
        self.distances, self.near = (v[~own].reshape(len(drawn), k) for v in (distances, near))
        self.drawn = drawn
        # Ranges of projections, a polygon around each category.
        directions = np.random.default_rng(0).normal(size=(self.n_dims, 16))
        if self.n_dims == 2:
            angles = np.arange(8) * np.pi / 8
            directions = np.stack([np.cos(angles), np.sin(angles)])
        self.projected = xy[drawn] @ directions
        # Cells within half the usual distance are close; chance is the share of neighbours that would be so by chance.
        near = float(np.median(self.distances[:, 0])) / 2
        self.close = self.distances <= near
        self.chance = np.ones(len(drawn))
        if near > 0:
            self.chance = np.minimum((near / np.maximum(self.distances[:, -1], near)) ** self.n_dims, 1)
        self.close_pairs = np.nonzero(self.close)

    def score(self, codes: np.ndarray) -> float | None:
        """Compare the closeness of cells of one category and of different ones; None unless categories overlap."""
        present = np.unique(codes[self.drawn])
        present = present[present >= 0]
        if len(present) < 2:
            return None
        position = np.full(codes.max() + 2, -1)  # the last one for missing values
        position[present] = np.arange(len(present))
        if not self._may_lie_over(position, codes):
            return None
        own: np.ndarray = position[codes[self.drawn]]
        other: np.ndarray = position[codes[self.near]]
        over = self._laid_over(own, len(present))
        if not over.any():
            return None
        valid = (own >= 0)[:, None] & (other >= 0)
        same = valid & (other == own[:, None]) & np.any(over, axis=1, keepdims=True)[own]
        across = valid & over[own[:, None], other]
        pitch = self._pitch(self.distances, same, own, len(present))
        return self._scattered(same, across) if pitch is None else self._lattices(across, own, other, pitch)

    def _may_lie_over(self, position: np.ndarray, codes: np.ndarray) -> bool:
        """Check close pairs and a sample of cells, to save time where there is no overlap."""
        row, column = self.close_pairs
        one, two = codes[self.drawn[row]], codes[self.near[row, column]]
        n_same, n_across = int(((one == two) & (one >= 0)).sum()), int(((one != two) & (one >= 0) & (two >= 0)).sum())
        few = slice(None, None, max(1, len(self.drawn) // _N_FEW))
        own, other = position[codes[self.drawn[few]]], position[codes[self.near[few]]]
        known = (own >= 0)[:, None] & (other >= 0)
        same = known & (own[:, None] == other)
        chance = self.chance[few]
        by_chance = chance @ same.sum(axis=1), chance @ (known & ~same).sum(axis=1)
        if n_across >= _MIN_PAIRS and n_same * by_chance[1] <= 0.9 * n_across * by_chance[0]:
            return True
        return self._pitch(self.distances[few], same, own, int(position.max()) + 1) is not None

    def _laid_over(self, own: np.ndarray, n: int) -> np.ndarray:
        """Whether a third of the cells of one category is inside the outline of the other, (n, n)."""
        sizes = np.bincount(own[own >= 0], minlength=n)
        # Fields of view at the border of the tissue may hold little beyond their overlap with the next one.
        small = sizes < (max(_MIN_PAIRS, np.median(sizes) / 2) if n > 4 else _MIN_PAIRS)
        over, covered = np.zeros((n, n), bool), np.zeros(len(own), bool)
        own = np.where((own >= 0) & ~small[own], own, -1)
        for b in np.flatnonzero(~small):
            rows = own == b
            low, high = np.quantile(self.projected[rows], [0.01, 0.99], axis=0)
            inside = ((self.projected >= low) & (self.projected <= high)).all(axis=1) & (own >= 0)
            share = np.bincount(own[inside], minlength=n) / np.maximum(sizes, 1)
            over[:, b] = share >= _MIN_INSIDE
            covered |= inside & over[own, b] & (own != b)
        np.fill_diagonal(over, False)
        if covered.sum() < _MIN_COVERED * (own >= 0).sum():
            over[:] = False
        return over | over.T

    def _scattered(self, same: np.ndarray, across: np.ndarray) -> float | None:
        """Score scattered cells: close pairs of one category and of two, relative to chance."""
        n_same, n_across = int((same & self.close).sum()), int((across & self.close).sum())
        if n_across < _MIN_PAIRS:
            return None
        if self.chance.min() == 1:  # most cells are at the location of another
            alike = n_across * same.sum() / across.sum()
        else:
            ratio = n_across / (self.chance @ across.sum(axis=1))
            # The same cells twice, as where fields of view overlap, count as slides only if these are most of the
            # cells.
            if ratio < _MIN_ACROSS or (ratio > 2 and (across & self.close).any(axis=1).mean() < 0.5):
                return None
            alike = min(ratio, 2.0) * float(self.chance @ same.sum(axis=1))
        if n_same > _MAX_WITHIN * alike or alike - n_same < _MIN_DEVIATION * alike**0.5:
            return None
        return float(n_same / alike)

    @staticmethod
    def _pitch(distances: np.ndarray, same: np.ndarray, own: np.ndarray, n: int) -> np.ndarray | None:
        """Pitch (n,) of the lattice that each category forms; None where they form none."""
        looked = same.any(axis=1)
        first = _first(distances, same)
        pitch = np.array([np.median(first[rows]) if (rows := own == c).any() else np.inf for c in range(n)])
        known = looked & np.isfinite(pitch[own]) & (pitch[own] > 0)
        if not known.any() or known.sum() < 0.8 * looked.sum():
            return None
        quarter, three = np.quantile(first[known] / pitch[own[known]], [0.25, 0.75])
        if three - quarter >= _MAX_UNEVEN:
            return None
        # Cell types that avoid themselves also have even distances to the nearest, but not to the third nearest.
        third = _first(distances[known], np.cumsum(same[known], axis=1) == 3)
        return pitch if (third < (1 + _MAX_UNEVEN) * first[known]).mean() > 0.5 else None

    def _lattices(self, across: np.ndarray, own: np.ndarray, other: np.ndarray, pitch: np.ndarray) -> float | None:
        """Score lattices: spots of another lattice within the pitch, unless all spots form one finer lattice."""
        finest = np.minimum(pitch[own], pitch[other[np.arange(len(own)), across.argmax(axis=1)]])
        near = _first(self.distances, across) < _MAX_LATTICE * finest
        if near.sum() < max(_MIN_PAIRS, _MIN_COVERED * across.any(axis=1).sum()):
            return None
        first, fourth = self.distances[near, 0], self.distances[near, min(3, self.distances.shape[1] - 1)]
        return None if np.median(first) > 0 and (fourth < 1.3 * first).mean() > 0.25 else 0.0


def _first(distances: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Distance to the nearest cell among ``of``, infinite where there is none."""
    return np.where(of.any(axis=1), distances[np.arange(len(of)), of.argmax(axis=1)], np.inf)
