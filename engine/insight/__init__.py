"""Reading what the cache reports: which image tokens a model keeps, attends and forgets."""
