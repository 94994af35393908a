"""Kernels, root file systems and initramfs: found, fetched, converted once, stored by digest."""
