"""Scores, floors, ceiling and audit; numpy only, no torch."""
