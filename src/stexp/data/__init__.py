"""Sections, slides, tiles, panels, splits and batches."""
