"""The version, where files and the package itself find it: `__version__` -> "0.1.0"."""

__version__ = "0.1.0"
