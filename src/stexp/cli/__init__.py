"""Commands: each file reads its config and calls the layers below."""

import gc

# torch, Lightning and timm make millions of objects that stay; with Python's own thresholds the collector goes over
# them again and again, for a quarter of a command's start
gc.set_threshold(50_000, 20, 50)
