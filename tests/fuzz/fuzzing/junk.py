"""Values that a user may pass by mistake: functions that make them, by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fuzzing.tissue import GENES, heist, hibio, make_tissue, tower

if TYPE_CHECKING:
    from collections.abc import Callable

JUNK: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "0": lambda: 0,
    "1": lambda: 1,
    "2": lambda: 2,
    "-1": lambda: -1,
    "0.5": lambda: 0.5,
    "1.5": lambda: 1.5,
    "2.0": lambda: 2.0,
    "-0.5": lambda: -0.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "1j": lambda: 1j,
    "np.int64(2)": lambda: np.int64(2),
    "np.float32(0.5)": lambda: np.float32(0.5),
    "np.bool_(True)": lambda: np.bool_(True),
    "np.str_('sample')": lambda: np.str_("sample"),
    "np.array(2)": lambda: np.array(2),
    "np.array([1.0, 2.0])": lambda: np.array([1.0, 2.0]),
    "np.array([])": lambda: np.array([]),
    "empty text": str,
    "a text": lambda: "nonsense",
    "a text with a slash": lambda: "a/b",
    "a text with NUL": lambda: "a\0b",
    "_index": lambda: "_index",
    "spatial": lambda: "spatial",
    "sample": lambda: "sample",
    "cell_type": lambda: "cell_type",
    "marks": lambda: "marks",
    "depth": lambda: "depth",
    "a gene": lambda: GENES[0],
    "bytes": lambda: b"sample",
    "an empty list": list,
    "a list of text": lambda: ["sample"],
    "a list of genes": lambda: GENES[:2],
    "a list of numbers": lambda: [1, 2],
    "a list of lists": lambda: [[1], [2]],
    "a list of None": lambda: [None],
    "a tuple": lambda: ("sample", "cell_type"),
    "a set": lambda: {"sample"},
    "an empty dict": dict,
    "a dict": lambda: {"sample": 1},
    "a dict of genes": lambda: {"set": GENES[:6]},
    "a Series": lambda: pd.Series([1, 2]),
    "a DataFrame": lambda: pd.DataFrame({"a": [1]}),
    "a path": lambda: Path("nowhere"),
    "a function": lambda: len,
    "an object": object,
    "a class": lambda: int,
    "a generator": lambda: (gene for gene in GENES[:2]),
    "an AnnData": make_tissue,
    "HEIST": heist,
    "HiBio": hibio,
    "a tower": tower,
    "np.random.default_rng(0)": lambda: np.random.default_rng(0),
    "np.random": lambda: np.random,
}
