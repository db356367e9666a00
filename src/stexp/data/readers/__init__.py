"""One file per data set layout, each with ``read(root, ...) -> list[Section]``."""
