"""Reading checkpoints: safetensors with checks, on-disk key names, the embedded tiny model."""
