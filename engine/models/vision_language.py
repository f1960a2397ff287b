"""What the engine needs of every model: pictures to features, a prompt to embeddings, a decoder."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..cache.crossing import Sight
from ..pictures.preprocess import Pixels
from .decoder import Decoder, Grid


class VisionLanguageModel(nn.Module):
    """A vision tower whose features take places in a decoder's sequence, or are seen beside it.

    Attributes:
        vision: the vision tower; ``encode`` runs it.
        decoder: the language decoder.
        image_token: the id that fills image positions in a prompt; its embedding is never used
            where features take their places.
        cross_layers: how many of the decoder's layers look at features beside the sequence. With
            any, a picture is one token, and its features take no places.
        most_features: features of a picture that such a layer holds at most.
    """

    vision: nn.Module
    decoder: Decoder
    image_token: int
    cross_layers: int = 0
    most_features: int = 0

    def image_tokens(self, pixels: Pixels) -> int:
        """Tokens that a picture takes in the sequence."""
        raise NotImplementedError

    def encode(self, pictures: Sequence[Pixels]) -> list[Tensor]:
        """Image tokens ``[image tokens, hidden]`` of every picture."""
        raise NotImplementedError

    def embed(
        self, token_ids: Tensor, spans: Sequence[tuple[int, int]], features: Sequence[Tensor]
    ) -> Tensor:
        """Embeddings ``[tokens, hidden]``, with picture i's features in place of ``spans[i]``."""
        # Image ids may lie beyond the table (LLaVA's original layout): look up id 0 there, then
        # overwrite.
        hidden = self.decoder.embed(token_ids.masked_fill(token_ids == self.image_token, 0))
        for (start, end), picture in zip(spans, features, strict=True):
            hidden[start:end] = picture
        return hidden

    def grids(
        self, sizes: Sequence[tuple[int, int]], times: Sequence[tuple[int, ...]] = ()
    ) -> list[Grid]:
        """Where the image tokens of pictures of ``sizes`` (width, height) lie, of a model whose
        rotation tells them apart; see ``Rotation.begin``. ``times`` are those of ``Pixels``.
        """
        return []

    def sights(
        self,
        spans: Sequence[tuple[int, int]],
        features: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
    ) -> list[Sight]:
        """What cross layers see of a turn's pictures, each behind the token that ends before its
        span; ``sizes`` (width, height) are the pictures' own.
        """
        return []
