"""The version; a module of its own, so that what names it does not import the package."""

__version__ = "0.1.0"
