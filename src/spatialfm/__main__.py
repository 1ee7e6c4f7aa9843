"""The command line: ``python -m spatialfm embed IN.h5ad OUT.h5ad``."""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import spatialfm as sfm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

_SUFFIXES = (".h5ad", ".zarr")
# Options of the command that are arguments of sfm.tl.embed.
_OPTIONS = ("library_key", "layer", "values", "basis", "groupby", "image", "device", "dtype", "key_added")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. An error in the input is one line, with exit code 2."""
    parser = _parser()
    given = parser.parse_args(arguments)
    quiet = {"verbosity": 1, "progress": False} if given.quiet else {}
    with sfm.settings.override(**quiet), warnings.catch_warnings():
        # One line each, without the file and line of the code.
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        try:
            _embed(given)
        except (ValueError, KeyError, OSError, ImportError) as error:
            # The text of a KeyError is the representation of its message.
            parser.exit(2, f"error: {error.args[0] if isinstance(error, KeyError) else error}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m spatialfm", description="Spatial-omics foundation models.")
    parser.add_argument("--version", action="version", version=f"spatialfm {sfm.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    embed = commands.add_parser(
        "embed",
        help="embed the cells of a file with a pretrained model",
        description="Embed the cells of a file and write a copy with the embedding. The expression is not changed.",
    )
    embed.add_argument(
        "source",
        metavar="IN",
        type=Path,
        help=".h5ad or .zarr, also a SpatialData store or a table in one: expression in X, coordinates in obsm",
    )
    embed.add_argument("target", metavar="OUT", type=Path, help=".h5ad or .zarr to write")
    embed.add_argument("--model", default="heist-niche", help="name, folder or file of a model (default: %(default)s)")
    # Without a default here: only given options are passed on, because a model refuses those that it does not read.
    embed.add_argument("--library-key", metavar="COLUMN", help="column of obs with the slide of each cell")
    embed.add_argument("--layer", help="layer to use instead of X")
    embed.add_argument("--values", help="auto, counts, normalized, log, intensity or scaled (default: auto)")
    embed.add_argument("--basis", metavar="KEY", help="key of the coordinates in obsm (default: spatial)")
    embed.add_argument(
        "--groupby", metavar="COLUMN", help="for heist: column of obs with the groups of the gene networks"
    )
    embed.add_argument("--image", type=Path, help="for hibio: file with the H&E image, if IN has none")
    embed.add_argument("--device", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    embed.add_argument("--dtype", help="for heist and heist-niche: float32 or bfloat16")
    embed.add_argument(
        "--key-added",
        metavar="NAME",
        help="NAME in the keys of the result: X_NAME_niche and X_NAME_state by the default model, X_NAME by the others",
    )
    embed.add_argument("--force", action="store_true", help="overwrite OUT if it is there")
    embed.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    return parser


def _embed(given: argparse.Namespace) -> None:
    _check_paths(given.source, given.target, overwrite=given.force)
    adata = _read(given.source)
    options = {name: value for name in _OPTIONS if (value := getattr(given, name)) is not None}
    sfm.tl.embed(adata, given.model, **options)
    _write(adata, given.target)


def _check_paths(source: Path, target: Path, *, overwrite: bool) -> None:
    for path in (source, target):
        # A table in a SpatialData store is a folder of any name.
        if path.suffix not in _SUFFIXES and not (path is source and path.is_dir()):
            msg = f"{path} does not end in {' or '.join(_SUFFIXES)}"
            raise ValueError(msg)
    if not source.exists():
        msg = f"there is no file {source}"
        raise FileNotFoundError(msg)
    if target.exists() and not overwrite:
        msg = f"{target} is there already; pass --force to overwrite it, or give another name"
        raise FileExistsError(msg)
    if target.exists() and target.is_dir() != (target.suffix == ".zarr"):
        kind = "folder" if target.is_dir() else "file"
        msg = f"{target} is a {kind}, which a {target.suffix} is not; give another name"
        raise ValueError(msg)
    if not target.absolute().parent.is_dir():
        msg = f"there is no folder {target.absolute().parent}; make it first"
        raise FileNotFoundError(msg)


def _read(path: Path) -> AnnData:
    from anndata import read_h5ad, read_zarr

    tables = sorted(p for p in (path / "tables").glob("[!.]*") if p.is_dir())
    if len(tables) > 1:
        names = " or ".join(map(str, tables))
        msg = f"{path} is a SpatialData store with {len(tables)} tables; name one of them, {names}"
        raise ValueError(msg)
    path = tables[0] if tables else path
    try:
        return read_h5ad(path) if path.suffix == ".h5ad" else read_zarr(path)
    except Exception as error:
        # HDF5 and zarr raise many kinds of errors on a file that is something else, or was cut off.
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        msg = f"{path} cannot be read as an AnnData ({reason}); write it again with adata.write_h5ad"
        raise ValueError(msg) from error


def _write(adata: AnnData, target: Path) -> None:
    """Write to a temporary folder beside the target, then rename: no other program ever sees half a file."""
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.absolute().parent) as folder:
        new = Path(folder) / target.name
        if target.suffix == ".h5ad":
            adata.write_h5ad(new)
        else:
            with warnings.catch_warnings():
                # anndata chooses the version of zarr.
                warnings.filterwarnings("ignore", "Writing zarr v2")
                adata.write_zarr(new)
        if target.is_dir():
            # A folder cannot be replaced in one step.
            target.rename(Path(folder) / f"old-{target.name}")
        new.replace(target)


if __name__ == "__main__":
    main()
