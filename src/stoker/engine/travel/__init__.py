"""Snapshots that leave a host in one file, and come into another."""
