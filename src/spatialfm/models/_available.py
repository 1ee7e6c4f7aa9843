"""The bundled models."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from safetensors import safe_open

from spatialfm.models._card import trained_on
from spatialfm.models._files import BUNDLED, WEIGHTS, bundled_folder, read_record

if TYPE_CHECKING:
    import pandas as pd


def available() -> pd.DataFrame:
    """List the bundled models without loading their weights.

    Returns
    -------
    One row for each model, indexed by the name that :func:`load` and :func:`spatialfm.tl.embed` take: ``architecture``,
    ``description``, ``n_parameters``, ``file_mb`` (size of the file in megabytes), ``trained_on`` and ``sha256`` of the
    weights.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> sfm.models.available()["architecture"].to_dict()
    {'heist-niche': 'heist-niche', 'heist': 'heist', 'hibio': 'hibio'}
    """
    import pandas as pd

    rows = {}
    for name, description in BUNDLED.items():
        folder = bundled_folder(name)
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            metadata = file.metadata()
            shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
        rows[name] = {
            "architecture": metadata["architecture"],
            "description": description,
            "n_parameters": sum(math.prod(shape) for shape in shapes),
            "file_mb": round((folder / WEIGHTS).stat().st_size / 1e6, 2),
            "trained_on": trained_on(read_record(folder)),
            "sha256": metadata["sha256"],
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("name")
