"""Pretraining: objectives and the loop."""

from spatialfm.train._pretrain import pretrain

__all__ = ["pretrain"]
