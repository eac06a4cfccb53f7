"""Encoder, heads, whitening layers and key queue."""
