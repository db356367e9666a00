"""Pages, tables, maps and files for people and other programs."""
