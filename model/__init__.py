"""The decoder and everything with parameters; caches, generation, checkpoints. Imports kernels only."""
