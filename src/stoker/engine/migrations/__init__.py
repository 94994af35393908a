"""Numbered SQL files: ``0001_name.sql`` brings a database of version 0 to version 1, and so on."""
