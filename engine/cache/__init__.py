"""The KV cache: storage, and one policy per file that says what is kept and what is attended."""
