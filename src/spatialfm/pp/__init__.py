"""Preprocessing: tissue graphs and gene networks, written to an AnnData."""

from __future__ import annotations

from spatialfm.pp._grn import grn

__all__ = ["grn"]
