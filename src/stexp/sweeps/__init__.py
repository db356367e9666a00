"""Jobs of a sweep, and running them."""
