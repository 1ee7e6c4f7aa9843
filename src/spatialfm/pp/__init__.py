"""Preprocessing: tissue graphs and gene networks, written to an AnnData."""
