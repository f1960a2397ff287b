"""A family that is asked as its checkpoint's own chat template says: the template, made a style."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..errors import CheckpointError
from ..prompts.chat_template import TemplateError, find_template
from ..prompts.own_template import own_style
from ..prompts.prompt import IMAGE_MARK
from ..prompts.templates import OWN
from ..prompts.tokenizer import Tokenizer
from .families import Family


def with_own_prompts(family: Family, folder: Path, tokenizer: Tokenizer) -> Family:
    """The family with its template's style, if that is what it is asked in.

    What is put around pictures is the template's affair then. Raises CheckpointError for a template
    that is missing or cannot be used.
    """
    if family.style != OWN:
        return family
    hint = "choose another --style"
    template = find_template(folder, with_tokenizers=not family.original)
    if template is None:
        raise CheckpointError(f"{folder} has no chat template to ask by", hint=hint)
    spelled = None if family.original else tokenizer.spelling(family.model.image_token)
    try:
        own = own_style(template, tokenizer, spelled or IMAGE_MARK)
    except TemplateError as error:
        raise CheckpointError(f"{folder / template.file} is not usable: {error}", hint) from None
    return replace(family, own=own, image_marks=())
