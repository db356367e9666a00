"""One method per file; image encoders and shared blocks beside them."""
