"""Make the bundled cortex with H&E, ``visium_human_dlpfc.h5ad`` and ``.jpg`` in ``src/spatialfm/datasets/``.

From sample 151673 of Maynard et al. 2021 as AnnData (counts in ``X``, ``obs["layer"]``, the image and its scale in
``uns["spatial"]``, citation and licence in ``uns["source"]``):

    python tools/make_visium_human_dlpfc.py SOURCE.h5ad src/spatialfm/datasets/visium_human_dlpfc

Genes are chosen by the share of spots in which they are detected, independently of labels. The same input gives the
same arrays.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata as ad
import numpy as np
import PIL.Image
from _bundle import write_small

_SHARE = 0.05  # share of spots in which a gene must be detected


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the sample as .h5ad")
    parser.add_argument("out", type=Path, help="where to write, without .h5ad and .jpg")
    parser.add_argument("--name", default="151673", help="name of the sample in uns['spatial']")
    parser.add_argument("--quality", type=int, default=90, help="quality of the JPEG")
    args = parser.parse_args()

    source = ad.read_h5ad(args.source)
    counts = source.X.toarray()
    # Neighbouring spots and genes of similar mean are put side by side, because similar values compress better.
    spots = np.lexsort((source.obs["array_col"], source.obs["array_row"]))
    genes = np.argsort(-counts.mean(axis=0), kind="stable")
    genes = genes[(counts > 0).mean(axis=0)[genes] > _SHARE]
    kept = counts[np.ix_(spots, genes)]
    small = kept.astype(np.uint16)
    if (kept != small).any():
        msg = f"{args.source}: X must hold counts below 65,536"
        raise ValueError(msg)
    obs = source.obs[["array_row", "array_col", "layer"]].iloc[spots].copy()
    obs["n_counts"] = counts.sum(axis=1)[spots].astype(np.int32)
    # Dense, because the positions of non-zeros would take more space than the zeros.
    adata = ad.AnnData(small, obs=obs, var=source.var[[]].iloc[genes])
    adata.obsm["spatial"] = source.obsm["spatial"][spots].astype(np.float32)

    stored = source.uns["spatial"][args.name]
    PIL.Image.fromarray(stored["images"]["lowres"]).save(
        args.out.with_suffix(".jpg"), quality=args.quality, optimize=True, progressive=True
    )
    factors = {key: value for key, value in stored["scalefactors"].items() if key != "tissue_hires_scalef"}
    adata.uns["spatial"] = {args.name: {"scalefactors": factors}}
    adata.uns["eval"] = source.uns["eval"]
    adata.uns["source"] = source.uns["source"] | {
        "changes": (
            f"{adata.n_vars:,} of {source.n_vars:,} genes: those with counts in more than {_SHARE:.0%} of spots, "
            "sorted by their mean; spots sorted by row and column; image compressed anew"
        )
    }
    write_small(adata, args.out.with_suffix(".h5ad"), columns=16)
    print(f"{args.out.with_suffix('.jpg')}: {args.out.with_suffix('.jpg').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
