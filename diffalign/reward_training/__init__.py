"""Training of preference scorers on the same pairs that models are trained on."""
