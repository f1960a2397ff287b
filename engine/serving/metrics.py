"""What a server counts, in the text form that Prometheus reads."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from threading import Lock

# Upper bounds in seconds, for times from a small model's step to a large one's prompt.
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_HELP = {
    "requests_total": "answers by how they ended",
    "rejected_total": "requests that got an error, by its status",
    "prompt_tokens_total": "tokens of prompts, pictures expanded",
    "image_tokens_total": "image tokens of prompts",
    "generation_tokens_total": "tokens of answers",
    "time_to_first_token_seconds": "from the request's arrival to its first token",
    "inter_token_seconds": "between the tokens of an answer",
    "queue_seconds": "from the request's arrival until it is begun",
    "requests_running": "answers in the making",
    "requests_waiting": "requests that are not begun",
    "cache_bytes": "bytes of the pools of keys and values",
    "shared_bytes": "of them those of pictures that others may ask about",
    "prefix_hits": "prompts whose beginning was there",
    "prefix_misses": "prompts whose beginning was read",
}


class Metrics:
    """Counts and times; any thread may add to them."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts: Counter[tuple[str, str]] = Counter()  # (name, labels)
        self._times: dict[str, tuple[list[int], list[float]]] = {}

    def count(self, name: str, by: float = 1, **labels: str) -> None:
        """Count on."""
        key = name, ",".join(f'{label}="{value}"' for label, value in labels.items())
        with self._lock:
            self._counts[key] += by  # type: ignore[assignment]  # sums of seconds, too

    def observe(self, name: str, seconds: float) -> None:
        """Add a time."""
        with self._lock:
            buckets, total = self._times.setdefault(name, ([0] * (len(BOUNDS) + 1), [0.0]))
            buckets[bisect_left(BOUNDS, seconds)] += 1
            total[0] += seconds

    def text(self, now: dict[str, float]) -> str:
        """All of it; ``now`` are values as they are at this moment.

        >>> Metrics().text({"requests_running": 2}).splitlines()[-1]
        'lvlm:requests_running 2'
        """
        with self._lock:
            lines = [*self._counted(), *self._timed()]
        for name, value in now.items():
            lines += [*_head(name, "gauge"), f"lvlm:{name} {value:g}"]
        return "\n".join(lines) + "\n"

    def _counted(self) -> Iterator[str]:
        said = ""
        for (name, labels), value in sorted(self._counts.items()):
            if name != said:
                yield from _head(name, "counter")
            said = name
            yield f"lvlm:{name}{{{labels}}} {value:g}" if labels else f"lvlm:{name} {value:g}"

    def _timed(self) -> Iterator[str]:
        for name, (buckets, (total,)) in sorted(self._times.items()):
            yield from _head(name, "histogram")
            below = 0
            for bound, number in zip((*BOUNDS, float("inf")), buckets, strict=True):
                below += number
                edge = "+Inf" if bound == float("inf") else f"{bound:g}"
                yield f'lvlm:{name}_bucket{{le="{edge}"}} {below}'
            yield f"lvlm:{name}_sum {total:g}"
            yield f"lvlm:{name}_count {below}"


def _head(name: str, kind: str) -> tuple[str, str]:
    return f"# HELP lvlm:{name} {_HELP.get(name, name)}", f"# TYPE lvlm:{name} {kind}"
