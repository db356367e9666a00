"""Tables and figures of the paper, from finished runs of a checkout."""
