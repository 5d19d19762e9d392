"""The bundled world: coloured shapes on a plain ground, small enough to know the truth of every picture."""
