"""What notebooks and commands call: data, training, scores and pictures as functions; exported lazily by ``stexp``."""
