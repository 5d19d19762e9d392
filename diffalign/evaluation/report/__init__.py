"""Comparison of models on the same captions and seeds, as one self-contained page (``eval/report.py``)."""
