"""Copy-on-write clones of root file systems."""
