"""Volumes in, slices out: NIfTI reading, dataset layouts, splits, the slice cache, the phantom."""
