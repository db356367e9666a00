"""Exported models, and what they say of slides without counts."""
