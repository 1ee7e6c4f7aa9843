"""What the fuzzing suite is made of: a small tissue, what may be odd about it, one valid call of every function, and what must hold after any call."""
