"""One file per data set layout, each with ``read_<name>(root, ...) -> list[Section]``."""
