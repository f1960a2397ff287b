"""The models: one file per idea, each configuration beside what it configures."""
