"""The terminal: flags to an engine, answers to stdout, everything else to stderr."""
