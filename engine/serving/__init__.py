"""HTTP: requests of many askers to one engine, and their answers as they come."""
