"""Run by test_ddp.py: pretrain from a file, and write the batches and the final weights of this process.

With ``--break``, the loss of the second process is NaN from its third step on.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

from spatialfm.models import fingerprint
from spatialfm.train import pretrain
from spatialfm.train._config import read_config
from spatialfm.train._heist import HEISTRecipe

drawn = []
original, losses = HEISTRecipe.batch, HEISTRecipe.losses


def batch(self, slide, contexts, random, *, augment=True):
    if augment:
        drawn.append(np.concatenate([c.cells for c in contexts]).tolist())
    return original(self, slide, contexts, random, augment=augment)


def broken(self, model, batch, generator):
    parts = losses(self, model, batch, generator)
    broken.calls += 1
    fails = broken.calls >= 3 and os.environ["LOCAL_RANK"] == "1"
    return {name: value * float("nan") if fails else value for name, value in parts.items()}


broken.calls = 0

if __name__ == "__main__":
    HEISTRecipe.batch = batch
    if "--break" in sys.argv:
        HEISTRecipe.losses = broken
    model = pretrain(**read_config(sys.argv[1]))
    result = {"drawn": drawn, "sha256": fingerprint(model)}
    Path(sys.argv[1]).with_name(f"process{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(result))
