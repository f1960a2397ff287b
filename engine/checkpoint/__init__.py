"""Files on disk: safetensors with checks, names, the hub, conversion."""
