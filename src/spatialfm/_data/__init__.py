"""Reading data: what an AnnData holds, checked and brought into one form."""
