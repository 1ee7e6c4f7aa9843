"""What was written, as tidy tables or graphs."""
