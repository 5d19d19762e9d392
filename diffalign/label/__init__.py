"""The labelling app: people compare or tag images in a browser; votes become training data (``docs/labelling.md``)."""
