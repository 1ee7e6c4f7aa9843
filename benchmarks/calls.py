"""Time of every call that works on an embedding, on files with cell types and niches in ``uns["eval"]``.

    python benchmarks/calls.py DATA [--files merfish_mouse_brain codex_mouse_spleen] [--only "impute zero_shot" ...]

Each file is embedded once; each call runs in a separate process on a copy of that, with all data in memory. A call is
run once on 2,000 cells before it is timed, so that imports and compilation do not count. Printed are wall and CPU
seconds, and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData

# Of proteins that name no pair in the bundled table: any will do to take the time.
_N_PAIRS = 5


def half_labelled(adata: AnnData, column: str) -> AnnData:
    """Labels of the left half of the tissue."""
    x = adata.obsm["spatial"][:, 0]
    adata.obs["half"] = adata.obs[column].where(x < sorted(x)[len(x) // 2])
    return adata


def with_samples(adata: AnnData) -> AnnData:
    """Take 36 blocks of tissue as samples, every other of them a case.

    Blocks of one slide are no patients: this is for the time only.
    """
    import numpy as np

    from spatialfm._data._splits import spatial_blocks

    blocks = spatial_blocks(adata.obsm["spatial"], np.zeros(adata.n_obs, np.int64))
    adata.obs["sample"] = [f"s{b}" for b in blocks]
    adata.obs["case"] = ["case" if b % 2 else "control" for b in blocks]
    return adata


def calls(adata: AnnData, cell: str, niche: str, slide: str | None) -> dict[str, Callable[[AnnData], Any]]:
    """Name of each call, and the call."""
    import spatialfm as sfm

    key, tune = {"library_key": slide}, {"method": "fine_tune"}
    pairs = None
    if not (set(map(str.upper, adata.var_names)) & {"FN1", "APOE", "PDGFA", "TGFB1"}):
        names = list(adata.var_names)
        pairs = list(zip(names[:_N_PAIRS], names[_N_PAIRS : 2 * _N_PAIRS], strict=True))
    samples = {"condition_key": "case", "sample_key": "sample"}
    return {
        "annotate": lambda a: sfm.tl.annotate(half_labelled(a, cell), groupby="half", **key),
        "annotate fine_tune": lambda a: sfm.tl.annotate(half_labelled(a, cell), groupby="half", **tune, **key),
        "evaluate": lambda a: sfm.tl.evaluate(a, niche, split="blocks", **key),
        "impute zero_shot": lambda a: sfm.tl.impute(a, **key),
        "impute fine_tune": lambda a: sfm.tl.impute(a, **tune, **key),
        "outcome mean": lambda a: sfm.tl.outcome(with_samples(a), **samples),
        "outcome attention": lambda a: sfm.tl.outcome(with_samples(a), pooling="attention", **samples),
        "ligand_receptor": lambda a: sfm.tl.ligand_receptor(a, cell, pairs=pairs, **key),
        "niche_composition": lambda a: sfm.tl.niche_composition(
            with_samples(a), niche, sample_key="sample", condition_key="case", groupby=cell
        ),
        "attention": lambda a: sfm.tl.attention(a, groupby=cell, **key),
    }  # fmt: skip


def one(path: Path, name: str) -> None:
    """Run one call and print its row."""
    import anndata as ad

    import spatialfm as sfm

    sfm.settings.progress = False
    sfm.settings.verbosity = 0
    adata = ad.read_h5ad(path)
    declared = adata.uns["eval"]
    slide = str(declared.get("slide", "")) or None
    cell, niche = str(declared["cell"][0]), str(declared["niche"][0])
    adata = adata[adata.obs[[cell, niche]].notna().all(axis=1)].copy()
    call = calls(adata, cell, niche, slide)[name]
    # A compact piece, in which every label has cells enough.
    x = adata.obsm["spatial"][:, 0]
    small = adata[x.argsort()[:2000]].copy()
    # Where there are too few cells of something, imports and compilation are done all the same.
    with contextlib.suppress(ValueError):
        call(small)
    sfm.pp.spatial_neighbors(adata, library_key=slide)
    wall, cores = time.perf_counter(), time.process_time()
    call(adata)
    wall, cores = time.perf_counter() - wall, time.process_time() - cores
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"| {path.stem} | {adata.n_obs:,} | {name} | {wall:.1f} | {cores:.1f} | {peak:.2f} |", flush=True)


def main() -> None:
    """Embed each file, then time each call in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--files", nargs="+", default=["merfish_mouse_brain", "codex_mouse_spleen"])
    parser.add_argument("--only", nargs="+", help="names of the calls")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.data, args.one)
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| file | cells | call | s | s of all cores | peak GB |\n|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for file in args.files:
            import anndata as ad

            import spatialfm as sfm

            sfm.settings.progress = False
            sfm.settings.verbosity = 0
            adata = ad.read_h5ad(args.data / f"{file}.h5ad")
            sfm.tl.embed(adata, library_key=str(adata.uns["eval"].get("slide", "")) or None)
            for key in ("spatial_connectivities", "spatial_distances"):
                del adata.obsp[key]
            del adata.uns["spatial_neighbors"]
            path = Path(folder) / f"{file}.h5ad"
            adata.write_h5ad(path)
            known = calls(adata, "", "", None)
            if unknown := set(args.only or ()) - set(known):
                parser.error(f"--only: no call is named {sorted(unknown)}; they are {list(known)}")
            for name in args.only or known:
                subprocess.run([sys.executable, __file__, str(path), "--one", name], check=True)


if __name__ == "__main__":
    main()
