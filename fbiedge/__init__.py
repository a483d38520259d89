"""fbiedge: train, export and run fully binarized language models. See README.md."""

__version__ = "0.1.0"
