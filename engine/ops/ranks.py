"""Processes that hold one model together, each a share of its heads (tensor parallelism).

Every process, a *rank*, runs the same program on the same prompts. What one has a part of is summed
or gathered between them; all go on with the same numbers, bit for bit, and so to the same choices
(Shoeybi et al. 2019, arXiv 1909.08053, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import EngineError, OptionError


@dataclass(frozen=True)
class Ranks:
    """One of ``size`` processes; alone nothing is sent."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of_group(cls) -> Ranks:
        """The process group that the caller has made; raises OptionError if there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            raise OptionError(
                "there is no process group", hint="call torch.distributed.init_process_group first"
            )
        return cls(dist.get_rank(), dist.get_world_size())

    def share(self, count: int, what: str) -> int:
        """This rank's part of ``count``; raises OptionError where it does not divide."""
        if count % self.size:
            raise OptionError(
                f"{self.size} processes cannot share {count} {what}",
                hint=f"use a number of processes that divides {count}",
            )
        return count // self.size

    def sum(self, part: Tensor) -> Tensor:
        """The sum of every rank's ``part``, in its place."""
        if self.size > 1:
            _sent(lambda: dist.all_reduce(part))
        return part

    def gather(self, part: Tensor, dim: int) -> Tensor:
        """Every rank's ``part``, one behind the other along ``dim``."""
        if self.size == 1:
            return part
        own = part.contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        _sent(lambda: dist.all_gather(parts, own))
        return torch.cat(parts, dim)

    def agree(self, given: Tensor) -> Tensor:
        """What rank 0 has, in place of one's own."""
        if self.size > 1:
            _sent(lambda: dist.broadcast(given, 0))
        return given

    def most(self, values: list[float]) -> list[float]:
        """The largest of every rank's, one by one."""
        if self.size == 1:
            return values
        found = torch.tensor(values, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        _sent(lambda: dist.all_reduce(found, dist.ReduceOp.MAX))
        return found.tolist()

    def mean(self, heads: Tensor) -> Tensor:
        """The mean over all ranks' heads of ``heads [heads, ...]``, the same on every rank."""
        own = heads.mean(0)
        return own if self.size == 1 else self.agree(self.sum(own) / self.size)


ALONE = Ranks()


def _sent(message: Callable[[], object]) -> None:
    try:
        message()
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0][:120]
        raise EngineError(
            f"another process of the model has ended or lost its connection ({reason})",
            hint="its own message says why; start all of them again",
        ) from None
