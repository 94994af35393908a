"""Stoker: microVMs for Linux people. ``Sandbox`` is the front door."""

__version__ = "0.1.0"
