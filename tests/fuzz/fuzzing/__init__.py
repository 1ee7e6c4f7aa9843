"""Parts of the fuzzing suite: a small tissue, oddities, a valid call of every function, and checks after any call."""
