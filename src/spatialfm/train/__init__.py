"""Pretraining of models: objectives, augmentation and the training loop."""

from spatialfm.train._pretrain import pretrain

__all__ = ["pretrain"]
