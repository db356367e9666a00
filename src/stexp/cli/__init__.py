"""Commands: each file reads its config and calls the layers below."""
