"""Pictures of noise."""

import torch
from PIL import Image


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture in which every pixel is different: resizing and cropping errors cannot hide."""
    generator = torch.Generator().manual_seed(seed + 1000 * width + height)
    pixels = torch.randint(0, 256, (height * width * 3,), generator=generator, dtype=torch.uint8)
    return Image.frombytes("RGB", (width, height), bytes(pixels.tolist()))
