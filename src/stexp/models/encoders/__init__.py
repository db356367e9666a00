"""Tiles and spots to features."""
