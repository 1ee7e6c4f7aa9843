"""Make the bundled breast tumour with H&E, ``her2_breast_tumour.h5ad`` and ``.jpg`` in ``src/spatialfm/datasets/``.

From a section of Andersson et al. 2021 as AnnData (counts in ``X``, locations of the spots in pixels of the image in
``obsm["spatial"]``) and its H&E image:

    python tools/make_her2_breast_tumour.py C2.h5ad C2.jpg src/spatialfm/datasets/her2_breast_tumour

The image is cropped to the spots with a margin of one patch, and downsampled by an integer factor. Coordinates are
shifted with the crop and stay in pixels of the full resolution. The same input gives the same arrays.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata as ad
import numpy as np
import PIL.Image
from scipy.sparse import csc_matrix
from scipy.spatial import cKDTree

_PITCH = 200.0  # µm between spots of the first Spatial Transcriptomics arrays
_SPOT = 100.0  # µm across
_PATCH = 112.0  # µm, the default of sfm.pp.patches


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", type=Path, help="the section as .h5ad")
    parser.add_argument("image", type=Path, help="its H&E image at full resolution")
    parser.add_argument("out", type=Path, help="where to write, without .h5ad and .jpg")
    parser.add_argument("--name", default="C2", help="name of the section")
    parser.add_argument("--factor", type=int, default=2, help="factor of the downsampling")
    parser.add_argument("--quality", type=int, default=90, help="quality of the JPEG")
    args = parser.parse_args()

    section = ad.read_h5ad(args.section)
    xy = section.obsm["spatial"].astype(np.float64)
    um = _PITCH / float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1]))

    PIL.Image.MAX_IMAGE_PIXELS = None
    image = PIL.Image.open(args.image).convert("RGB")
    margin = _PATCH / um
    corner = np.maximum(np.floor(xy.min(axis=0) - margin), 0).astype(int)
    end = np.minimum(np.ceil(xy.max(axis=0) + margin), image.size).astype(int)
    # Whole pixels of the downsampled image, so that the factor is the same in both directions.
    end -= (end - corner) % args.factor
    image.crop((*corner, *end)).reduce(args.factor).save(
        args.out.with_suffix(".jpg"), quality=args.quality, optimize=True, progressive=True
    )

    # The csc layout compresses better by a third; it is converted on loading.
    counts = csc_matrix(section.X)
    small = counts.astype(np.uint16)
    if (counts != small).nnz:
        msg = f"{args.section}: X must hold counts below 65,536"
        raise ValueError(msg)
    adata = ad.AnnData(small, obs=section.obs[["array_row", "array_col"]], var=section.var[[]])
    adata.obsm["spatial"] = (xy - corner).astype(np.float32)
    adata.uns["spatial"] = {
        args.name: {
            "scalefactors": {
                "tissue_hires_scalef": 1 / args.factor,
                "spot_diameter_fullres": _SPOT / um,
                "microns_per_pixel": um,
            }
        }
    }
    adata.uns["source"] = {
        "citation": (
            "Andersson et al. 2021, Spatial deconvolution of HER2-positive breast cancer delineates tumor-associated "
            "immune cell type interactions, Nature Communications 12, 6012, https://doi.org/10.1038/s41467-021-26271-2"
        ),
        "license": "CC BY 4.0 (Zenodo record of the study, https://doi.org/10.5281/zenodo.4751624)",
        "changes": (
            f"image cropped to x from {corner[0]} to {end[0]} and y from {corner[1]} to {end[1]}, {args.factor} x "
            f"{args.factor} pixels made one, compressed anew; coordinates shifted with it"
        ),
        "sample": args.name,
        "organism": "human",
        "technology": "Spatial Transcriptomics (100 micrometre spots, 200 micrometre pitch)",
        "tissue": "HER2-positive breast tumour",
        "values": "raw counts",
        "units": "pixel of the full resolution, from the corner of the crop",
    }
    adata.write_h5ad(args.out.with_suffix(".h5ad"), compression="gzip", compression_opts=9)
    for suffix in (".h5ad", ".jpg"):
        print(f"{args.out.with_suffix(suffix)}: {args.out.with_suffix(suffix).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
