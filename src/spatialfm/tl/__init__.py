"""Tools: AnnData in, AnnData fields out."""
