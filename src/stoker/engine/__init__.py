"""Sandboxes: joins images, storage, network, vmm and guest."""
