"""Run by test_ddp.py: pretrain as a file says, and write down what this process drew and where its weights ended."""

import json
import os
import sys
from pathlib import Path

import numpy as np

from spatialfm.models import fingerprint
from spatialfm.train import pretrain
from spatialfm.train._config import read_config
from spatialfm.train._recipes import HEISTRecipe

drawn = []
original = HEISTRecipe.batch


def batch(self, slide, contexts, random, *, augment=True):
    if augment:
        drawn.append(np.concatenate([c.cells for c in contexts]).tolist())
    return original(self, slide, contexts, random, augment=augment)


if __name__ == "__main__":
    HEISTRecipe.batch = batch
    model = pretrain(**read_config(sys.argv[1]))
    seen = {"drawn": drawn, "sha256": fingerprint(model)}
    Path(sys.argv[1]).with_name(f"process{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(seen))
