"""Stoker: microVMs for Linux people. ``Sandbox`` is the front door."""
