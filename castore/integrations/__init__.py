"""castore in frameworks for training, one module each. None of them is imported but by those who use it."""
