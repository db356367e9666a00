"""Completion: some spots, or some genes, of a section are measured, and the rest is asked for."""
