"""Held-out scores of a run as a Markdown table: `python -m training.curves runs/tiny/log.jsonl`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

COLUMNS = ("loss/text", "loss/patch_right", "token", "colour", "shape", "where", "zone")
COLUMNS += ("count", "yesno", "describe", "field", "read")


def table(lines: list[str]) -> str:
    """One row per scoring; shares of exact answers unless the column says loss or token."""
    rows = ["| stage | minutes | pages seen | " + " | ".join(COLUMNS) + " |"]
    rows.append("|---" * (3 + len(COLUMNS)) + "|")
    for record in map(json.loads, lines):
        if "held_out" in record:
            cells = [f"{record['held_out'].get(c, float('nan')):.2f}" for c in COLUMNS]
            head = [record["stage"], f"{record['seconds'] / 60:.0f}", str(record["pages"])]
            rows.append("| " + " | ".join(head + cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    sys.stdout.write(table(text.splitlines()) + "\n")
