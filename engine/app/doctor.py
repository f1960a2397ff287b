"""``--check``: what this machine offers, and whether a model folder is whole.

Every check is one line; what fails does not keep the next one from running. Files are read in
pieces of 16 MB, so that a folder of any size needs little memory.
"""

from __future__ import annotations

import hashlib
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ..checkpoint.folder_files import read_json
from ..checkpoint.hub import TINY, resolve
from ..checkpoint.names import target_names
from ..checkpoint.packed import format_name
from ..checkpoint.tensors import Checkpoint, TensorInfo, fit_weights
from ..errors import CheckpointError, EngineError
from ..loading.families import Family, Wishes, recognise
from ..loading.own_prompts import with_own_prompts
from ..loading.published import told_sampling
from ..pictures.patches import PatchProcessor
from ..prompts.chat_template import TemplateError, difference, find_template, question
from ..prompts.tokenizer import Tokenizer
from ..refusals import hint_for
from .machine import describe, environment
from .terminal import complain, escaped, say, say_json

CHUNK = 16 << 20

# The hub's cache names a file by its content: sha256 of large ones, git's sha1 of small ones.
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class Finding:
    """How one check went: what was looked at, and in words what was found.

    One that warns is no damage.
    """

    name: str
    ok: bool
    text: str
    hint: str = ""
    warns: bool = False

    def __str__(self) -> str:
        state = ("WARNING" if self.warns else "ok") if self.ok else "FAILED"
        return f"{self.name}: {state} - {self.text}" + (f" ({self.hint})" if self.hint else "")


def check(
    name: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    quiet: bool = False,
    as_json: bool = False,
    vision_tower: str | None = None,
) -> int:
    """Print the state of this machine and of a model (None: the embedded one).

    A line for each check as it is done, or with ``as_json`` one object at the end.

    Returns 0, or the exit code of damaged weights. Raises CheckpointError if ``name`` is no model.
    """
    tell = (lambda _: None) if as_json else _say_line
    machine = environment()
    for line in describe(machine):
        tell(line)
    folder, findings = None, []
    if name is None and not (TINY / "config.json").exists():
        tell("model: the embedded model is not installed; name one with --model")
    else:
        folder = resolve(None if name is None else Path(name), revision, offline)
        tell(f"model: {folder}")
        for finding in Examination(folder, quiet, vision_tower, offline).run():
            tell(str(finding))
            findings.append(finding)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if _MAC else 1024)
    damage = sum(not finding.ok for finding in findings)
    if as_json:
        found = {"model": folder and str(folder), "checks": [asdict(each) for each in findings]}
        say_json(machine | found | {"failed": damage, "peak_bytes": peak})
    elif folder:
        tell(f"peak memory of this check: {peak / 1e6:,.0f} MB")
        warnings = [finding.name for finding in findings if finding.warns]
        whole = "the model folder is whole"
        whole += f", with a warning of its {' and '.join(warnings)}" if warnings else ""
        tell(f"{damage} of the checks failed" if damage else whole)
    if not damage:
        return 0
    first = next(finding for finding in findings if not finding.ok)
    complain(f"{folder}: {damage} of the checks failed, the first is {first.name}", first.hint)
    return CheckpointError.exit_code


def _say_line(text: str) -> None:
    say(f"{text}\n")


_MAC = sys.platform == "darwin"  # which counts bytes where others count kilobytes


class Examination:
    """The checks of one model folder."""

    def __init__(
        self,
        folder: Path,
        quiet: bool = False,
        vision_tower: str | None = None,
        offline: bool = False,
    ) -> None:
        self.folder, self.quiet = folder, quiet
        self._vision_tower, self._offline = vision_tower, offline
        self._family: Family | None = None
        self._tokenizer: Tokenizer | None = None
        self._checkpoint: Checkpoint | None = None

    def run(self) -> Iterator[Finding]:
        """Run all checks; yields how each went as soon as it is known."""
        yield self._try("config", self._config)
        if self._family:
            yield from self._odd_format()
        yield self._try("tokenizer", self._read_tokenizer)
        if self._family and self._tokenizer:
            yield self._template(self._family, self._tokenizer)
        yield self._try("hashes", self._hashes)
        yield self._try("headers", self._headers)
        if self._checkpoint:
            with self._checkpoint:
                if self._family:
                    yield self._try("formats", self._formats)
                    yield self._try("shapes", self._shapes)
                yield self._try("values", self._values)

    def _try(self, name: str, action: Callable[[], str]) -> Finding:
        try:
            return Finding(name, True, action())
        except EngineError as error:
            return Finding(name, False, escaped(str(error)), escaped(error.hint))

    def _config(self) -> str:
        self._family = recognise(self.folder, Wishes(None, self._vision_tower, self._offline))
        model = self._family.model
        _check_ends(self.folder, self._family)
        size = sum(parameter.numel() for parameter in model.parameters())
        kind = f"{type(model).__name__}, {size / 1e6:,.1f} M parameters"
        limit = model.decoder.config.limit
        said = f"{kind}, prompts as {self._family.style}, a {limit} tokens"
        if isinstance(self._family.processor, PatchProcessor):
            cells = self._family.processor.cells
            said += f", pictures of {cells.least // cells.side**2:,} to "
            said += f"{cells.most // cells.side**2:,} tokens (--max-image-tokens makes it fewer)"
        if model.cross_layers:
            said += f", pictures of up to {model.most_features:,} features beside the sequence, "
            said += f"looked at in {model.cross_layers} cross layers"
        return said + told_sampling(self.folder)

    def _odd_format(self) -> Iterator[Finding]:
        """A warning of a format of numbers that there is not: others read it from the file."""
        values = read_json(self.folder / "config.json")
        for key in ("torch_dtype", "dtype"):
            named = values.get(key)
            found = getattr(torch, str(named).removeprefix("torch."), None)
            if named is not None and not isinstance(found, torch.dtype):
                text = f"{key} of config.json is {named!r:.40}, which is no format of numbers"
                yield Finding("dtype", True, escaped(text), warns=True)

    def _read_tokenizer(self) -> str:
        new = self._family.new_tokens if self._family else ()
        self._tokenizer = Tokenizer.from_folder(self.folder, new)
        return f"'What is this?' is {len(self._tokenizer.encode('What is this?'))} tokens"

    def _template(self, family: Family, tokenizer: Tokenizer) -> Finding:
        """Compare our prompts with those of the checkpoint's own template."""
        name, style = "template", family.style
        try:
            template = find_template(self.folder, with_tokenizers=not family.original)
            family = with_own_prompts(family, self.folder, tokenizer)
            asked = f"; a prompt is {question(family.prompts, tokenizer)!r}"
            if template is None:
                return Finding(name, True, f"there is none; prompts as {style}{asked}")
            if family.own:
                return Finding(name, True, f"{template.file} decides the prompt{asked}")
            found = difference(template, tokenizer, style)
        except TemplateError as error:
            text = f"not compared with {style}: {escaped(str(error))}"
            return Finding(name, True, text, warns=True)
        except EngineError as error:
            return Finding(name, False, escaped(str(error)), escaped(error.hint))
        if found:
            hint = "--style template asks as the template does, --raw as you write it yourself"
            return Finding(name, True, escaped(found), hint, warns=True)
        return Finding(name, True, f"{template.file} renders what style {style} does{asked}")

    def _hashes(self) -> str:
        """Compare files with the checksums that the hub's cache has in their names."""
        paths = sorted(path for path in self.folder.iterdir() if blob_name(path))
        wrong = []
        total = sum(path.stat().st_size for path in paths)
        with self._bar("hashes", total) as bar:
            for path in paths:
                if not has_its_hash(path, bar.update):
                    wrong.append(path.name)
        if wrong:
            raise CheckpointError(
                f"{', '.join(wrong)}: the content is not what was published",
                hint="delete what these links point to, and download again",
            )
        if not paths:
            return "nothing to compare with: not a folder of the hub's cache"
        return f"{len(paths)} files, {total / 1e6:,.1f} MB, are what the hub published"

    def _headers(self) -> str:
        self._checkpoint = Checkpoint.open(self.folder)
        tensors = self._checkpoint.on_disk
        files = {info.file for info in tensors.values()}
        megabytes = self._checkpoint.total_bytes / 1e6
        return f"{len(files)} files, {len(tensors)} tensors, {megabytes:,.1f} MB"

    def _formats(self) -> str:
        """Which format the tensors of each part of the model have, and their bytes."""
        assert self._family, "there is a config"
        assert self._checkpoint, "there are headers"
        sizes: dict[str, dict[str, int]] = {}
        for info in self._checkpoint.tensors.values():
            ours = (*target_names(self._family.rename(info.name)), "unused")[0]
            held = sizes.setdefault(_part(ours), {})
            held[format_name(info)] = held.get(format_name(info), 0) + info.nbytes
        parts = (
            f"{part} {', '.join(f'{name} {size / 1e6:,.1f} MB' for name, size in held.items())}"
            for part, held in sizes.items()
        )
        return "; ".join(parts)

    def _shapes(self) -> str:
        assert self._family, "there is a config"
        assert self._checkpoint, "there are headers"
        return _fit(self._family, self._checkpoint)

    def _values(self) -> str:
        """Look for NaN and infinity in every floating-point tensor."""
        assert self._checkpoint, "there are headers"
        checkpoint, wrong = self._checkpoint, []
        with self._bar("values", checkpoint.total_bytes) as bar:
            for info in checkpoint.on_disk.values():
                if count := _not_finite(info, bar.update):
                    wrong.append(f"{info.name} ({count:,})")
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise CheckpointError(
                f"NaN or infinity in {', '.join(wrong[:5])}{more}",
                hint="download the weights again",
            )
        return f"{len(checkpoint.on_disk)} tensors, all numbers finite"

    def _bar(self, what: str, total: int) -> tqdm[object]:
        hidden = True if self.quiet else None  # None: shown on a terminal only
        return tqdm(
            total=total, desc=what, unit="B", unit_scale=True, disable=hidden, file=sys.stderr
        )


def _check_ends(folder: Path, family: Family) -> None:
    """Refuse end tokens that the model cannot say: its answers would have no end."""
    vocab = family.model.decoder.config.vocab
    beyond = [token for token in family.end_tokens if not 0 <= token < vocab]
    if beyond and len(beyond) == len(family.end_tokens):
        raise CheckpointError(
            f"{folder}: the end token {beyond[0]} is none of the model's {vocab} tokens",
            hint="compare eos_token_id of generation_config.json with the published one",
        )


def _part(name: str) -> str:
    """The part of a model that a tensor belongs to, by our name: the decoder's one by one."""
    words = name.split(".")
    return words[1] if words[0] == "decoder" else words[0]


def blob_name(path: Path) -> str:
    """The checksum in the name of the blob that a hub snapshot's file links to; "" if none."""
    if not path.is_symlink():
        return ""
    target = Path(os.readlink(path))
    found = target.parent.name == "blobs" and _BLOB.fullmatch(target.name) and path.is_file()
    return target.name if found else ""


def has_its_hash(path: Path, progress: Callable[[int], object] = lambda _: None) -> bool:
    """Whether a snapshot's file has the content that its blob's name states."""
    name = blob_name(path)
    if len(name) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                progress(len(chunk))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", hint_for(error)) from error
    return digest.hexdigest() == name


def _not_finite(info: TensorInfo, progress: Callable[[int], object]) -> int:
    """How many numbers of a stored tensor are NaN or infinite."""
    count = 0
    buffer = bytearray(min(CHUNK, info.nbytes))
    try:
        with info.file.open("rb") as file:
            file.seek(info.start)
            for at in range(0, info.nbytes, CHUNK):
                size = min(CHUNK, info.nbytes - at)
                if file.readinto(memoryview(buffer)[:size]) != size:
                    raise CheckpointError(f"{info.file} became shorter while it was read")
                if info.dtype.is_floating_point:
                    values = torch.frombuffer(buffer, dtype=torch.uint8, count=size)
                    finite = torch.isfinite(values.view(info.dtype))
                    count += finite.numel() - int(finite.sum())
                progress(size)
    except OSError as error:
        raise CheckpointError(f"{info.file}: {error.strerror}", hint_for(error)) from error
    return count


def _fit(family: Family, checkpoint: Checkpoint) -> str:
    """Compare names and shapes with what the configuration asks for, as loading does."""
    model, elsewhere = family.model, ""
    held = [ours for name in checkpoint.tensors for ours in target_names(family.rename(name))]
    if family.tower and not any(name.startswith("vision.") for name in held):
        tower, names = family.tower
        with Checkpoint.open(tower) as tower_checkpoint:
            fit_weights(model.vision, tower_checkpoint, names)
        elsewhere = "vision."
    tied = {"decoder.head.weight": "decoder.embed.weight"} if model.decoder.config.tied_head else {}
    fit = fit_weights(model, checkpoint, family.rename, tied, elsewhere)
    apart = f", the vision tower from {family.tower[0]}" if elsewhere and family.tower else ""
    return f"{len(fit.sources)} tensors fit the configuration, {len(fit.ignored)} are unused{apart}"
