"""Command lines."""

from diffalign.cli.main import main

__all__ = ["main"]
