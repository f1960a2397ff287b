"""What a cache keeps and attends: one policy per file, and what policies see and decide."""
