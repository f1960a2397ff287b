"""Decoders with seeded weights made where they are used, and transformers' model on the same ones.

No checkpoint is read: a 7B model of real shapes stands on a GPU after seconds. What it says is
noise, how long it takes is not. Pictures are random embeddings, so no vision tower is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.predict import Shape
from engine.loading.preparing import prepare
from engine.models.decoder import Decoder, DecoderConfig
from engine.models.vision_language import VisionLanguageModel

SEED, DEVIATION, CONTEXT = 20240914, 0.02, 8192


class DecoderOnly(VisionLanguageModel):
    """A decoder that takes ready image embeddings."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.decoder = Decoder(config)
        self.image_token = config.vocab


def seeded_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> DecoderOnly:
    """A model of ``shape`` in ``dtype``, drawn on ``device``: normal weights, norms of one."""
    with torch.device("meta"):
        model = DecoderOnly(_config(shape)).to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(SEED)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.fill_(1)
            else:
                weight.normal_(0, DEVIATION, generator=generator)
    prepare(model.decoder, device)
    return model.eval().requires_grad_(False)


def _config(shape: Shape) -> DecoderConfig:
    return DecoderConfig(
        vocab=shape.vocab,
        hidden=shape.hidden,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        mlp=shape.mlp,
        rope_theta=10000.0,
        norm_eps=1e-5,
        qkv_bias=False,
        tied_head=False,
        context=CONTEXT,
    )


def transformers_twin(model: DecoderOnly, shape: Shape, attention: str = "sdpa") -> Any:
    """transformers' Llama whose parameters are the tensors of ``model``: no second copy exists.

    LLaVA's language model is this class; without the picture's part around it, it is a little
    faster than LLaVA in transformers.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    weight = model.decoder.norm.weight
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        attn_implementation=attention,
        dtype=weight.dtype,
    )
    with torch.device("meta"):
        twin = LlamaForCausalLM(config)
    twin.load_state_dict(_their_names(model), assign=True)
    # What a checkpoint does not hold: rotary frequencies, computed anew on the device.
    with weight.device:
        twin.model.rotary_emb = type(twin.model.rotary_emb)(config)
    return twin.eval().requires_grad_(False)


def _their_names(model: DecoderOnly) -> dict[str, Tensor]:
    """Our tensors under the names of a Llama checkpoint."""
    state = {}
    for name, tensor in model.decoder.state_dict().items():
        for ours, theirs in _NAMES:
            name = name.replace(ours, theirs)
        state[name if name.startswith("lm_head") else f"model.{name}"] = tensor
    return state


_NAMES = [
    ("embed.", "embed_tokens."),
    ("head.", "lm_head."),
    ("attn_norm", "input_layernorm"),
    ("mlp_norm", "post_attention_layernorm"),
    *((f".{part}_proj", f".self_attn.{part}_proj") for part in "qkvo"),
    *((f".{part}_proj", f".mlp.{part}_proj") for part in ("gate", "up", "down")),
]
