"""A plug-in for stexp: a method, a data set and an image encoder, to copy and to change."""
