"""Pure functions over tensors: losses, log-probabilities, the packed layout. Imports torch alone."""
