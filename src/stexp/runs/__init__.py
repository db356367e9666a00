"""The folder of a run: written, opened again, scored anew."""
