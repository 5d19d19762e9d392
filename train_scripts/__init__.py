"""Scripts that train: a model's alignment, and the bundled world itself."""
