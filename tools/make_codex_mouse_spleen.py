"""Make the bundled spleen, ``codex_mouse_spleen.h5ad`` in ``src/spatialfm/datasets/``.

From the sample BALBc-1 of Goltsev et al. 2018 as AnnData (compensated intensities in ``X``, nanometres in
``obsm["spatial"]``, the columns ``tile``, ``cell_type`` and ``compartment``, citation and licence in
``uns["source"]``):

    python tools/make_codex_mouse_spleen.py SOURCE.h5ad src/spatialfm/datasets/codex_mouse_spleen.h5ad

Only whole tiles are cut out. The same input gives the same arrays.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata as ad
import numpy as np
from _bundle import write_small

# Tiles are numbered from the top in columns of 9; these are three rows of four columns.
_TILES = [9 * column + row for column in range(4) for row in (5, 6, 7)]
_BITS = 7  # of the significand: a relative error of at most 0.4 %


def _rounded(x: np.ndarray) -> np.ndarray:
    """Round to whole numbers of ``_BITS`` significant bits."""
    significand, exponent = np.frexp(x)
    return np.rint(np.ldexp(np.rint(np.ldexp(significand, _BITS)), exponent - _BITS)).astype(np.float32)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the whole sample as .h5ad")
    parser.add_argument("out", type=Path, help="the .h5ad to write")
    args = parser.parse_args()

    source = ad.read_h5ad(args.source)
    tile = source.obs["tile"].astype(float).astype(int)
    cut = source[tile.isin(_TILES).to_numpy()]
    obs = cut.obs[["cell_type", "compartment"]].apply(lambda column: column.cat.remove_unused_categories())
    obs["tile"] = tile[cut.obs_names].astype("category")
    adata = ad.AnnData(_rounded(np.asarray(cut.X)), obs=obs, var=cut.var[[]])
    adata.obsm["spatial"] = (cut.obsm["spatial"] / 1000).astype(np.float32)
    adata.uns["eval"] = source.uns["eval"]
    adata.uns["source"] = source.uns["source"] | {
        "units": "micrometre",
        "changes": (
            f"{adata.n_obs:,} of {source.n_obs:,} cells: those of the tiles {', '.join(map(str, _TILES))}; intensities "
            f"rounded to whole numbers and {_BITS} significant bits; coordinates in micrometres"
        ),
    }
    write_small(adata, args.out)


if __name__ == "__main__":
    main()
