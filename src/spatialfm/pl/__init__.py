"""Plots of what stands in an AnnData."""
