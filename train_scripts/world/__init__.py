"""Rebuilds the bundled world from nothing: ``python -m train_scripts.world.build``."""
