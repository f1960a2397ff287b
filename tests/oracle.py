"""Transformers, as the oracle: the same folder loaded there, asked the same question."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.utils import logging

logging.disable_progress_bar()


class Oracle:
    """A LLaVA of transformers with its own processor and template."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        ).eval()
        self.model.generation_config.eos_token_id = None  # go on to the asked length
        self.processor = AutoProcessor.from_pretrained(folder)

    def inputs(
        self, messages: Sequence[dict[str, Any]] | str, images: Sequence[Image.Image]
    ) -> dict[str, Tensor]:
        """Ids, pixels and mask of a conversation, or of a text that is already rendered."""
        text = messages
        if not isinstance(messages, str):
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        made = self.processor(text=text, images=list(images) or None, return_tensors="pt")
        if "pixel_values" in made:
            made["pixel_values"] = made["pixel_values"].to(self.model.dtype)
        return dict(made)

    @torch.inference_mode()
    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """Scores ``[tokens, vocab]`` in fp32."""
        return self.model(**inputs).logits[0].float()

    @torch.inference_mode()
    def greedy(self, inputs: dict[str, Tensor], count: int) -> list[int]:
        """The ``count`` likeliest tokens, one after the other."""
        made = self.model.generate(**inputs, max_new_tokens=count, do_sample=False)
        return made[0, inputs["input_ids"].shape[1] :].tolist()
