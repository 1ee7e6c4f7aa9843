"""Pretrain a model from a TOML file: ``python -m spatialfm.train CONFIG.toml``."""

from __future__ import annotations

import argparse
import sys

from spatialfm.train import pretrain
from spatialfm.train._config import read_config


def main() -> None:
    """Read the file and pretrain."""
    parser = argparse.ArgumentParser(
        prog="python -m spatialfm.train",
        description="Pretrain a model on spatial slides. An interrupted run continues if called with the same file.",
    )
    parser.add_argument("config", metavar="CONFIG.toml", help="keys are the arguments of spatialfm.train.pretrain")
    try:
        pretrain(**read_config(parser.parse_args().config))
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
