"""From a model's name to a model in memory."""
