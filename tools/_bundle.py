"""Writing of the small .h5ad files in the package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata as ad
import h5py
import numpy as np

if TYPE_CHECKING:
    from pathlib import Path


def write_small(adata: ad.AnnData, path: Path, *, columns: int = 1) -> None:
    """Write an AnnData with little disk space: gzip after shuffling bytes, in chunks of ``columns`` columns."""
    gzip = {"compression": "gzip", "compression_opts": 9}

    def write(writer: Any, group: Any, key: str, elem: Any, *, dataset_kwargs: Any, **_: Any) -> None:
        options = dataset_kwargs
        # Scalars and strings cannot be shuffled.
        if isinstance(elem, np.ndarray) and elem.ndim and elem.dtype.kind in "iufb":
            options = gzip | {"shuffle": True}
            if elem.ndim == 2:
                options |= {"chunks": (len(elem), min(columns, elem.shape[1]))}
        writer(group, key, elem, dataset_kwargs=options)

    with h5py.File(path, "w") as file:
        ad.experimental.write_dispatched(file, "/", adata, write, dataset_kwargs=gzip)
    print(f"{path}: {path.stat().st_size:,} bytes")
