"""Training of LaVIT (arXiv 2309.04669): from raw image-text pairs to a model that reads and draws pictures."""

__version__ = "0.1.0"
