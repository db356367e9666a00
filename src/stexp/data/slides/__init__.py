"""Whole-slide images: formats, tiles, tissue, stain."""
