"""Write docs/results.md from the measurements in bench/results: `python -m bench.report`.

The page holds no number that is not in a committed file: it is never edited by hand, and a test
compares it with what this command writes. Text that explains stands here; what of the paper's
claims holds is computed.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bench.common import RESULTS, ROOT, cell, origin, table
from engine.errors import OptionError
from engine.policies.specs import parse

Record = dict[str, Any]
Row = dict[str, Any]

PAGE = ROOT / "docs" / "results.md"
FIGURES = "figures"
ATTENTION = ("attention_by_modality", "sparsity_by_layer", "ppci_between_layers")
ATTENTION += ("ppci_between_steps",)
ABOUT_ATTENTION = "The paper's figures 1 and 3 to 5, under the full cache; data as CSV beside them."
INTRO = """# Results

Written by `python -m bench.report` from the files in `bench/results/`; nothing here is typed by
hand. Every table names the machine, the commit and the command that measures it again. "The paper"
is A-VL (arXiv 2409.14846); what it published stands beside what was measured here.
"""
MISSING = "Not measured yet: `{}`."


@dataclass(frozen=True)
class Section:
    """A part of the page: which reports it shows, and how their rows become a table."""

    title: str
    about: str
    names: tuple[str, ...]  # beginnings of report names, the longest that fits decides
    command: str
    shape: Callable[[Record], list[Row]]
    drawn: bool = False  # whether bench.figures draws these reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it differs")
    options = parser.parse_args()
    page = render(read_all(RESULTS))
    if not options.check:
        PAGE.write_text(page, encoding="utf-8")
        print(PAGE)
    elif PAGE.read_text(encoding="utf-8") != page:
        parser.error(f"{PAGE} is not what bench/results says: run python -m bench.report")


def read_all(folder: Path) -> list[Record]:
    """Every report of the common form, by name."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [record for record in found if record.get("rows") and "machine" in record]


def render(records: Sequence[Record]) -> str:
    """The page, as Markdown."""
    lines = [INTRO, *claims(records)]
    for section in SECTIONS:
        lines += [f"## {section.title}", "", section.about, ""]
        shown = [record for record in records if section_of(record["name"]) is section]
        if not shown:
            lines += [MISSING.format(section.command), ""]
        for record in shown:
            lines += [f"### {record['name']}", "", *table(section.shape(record)), ""]
            lines += [line for note in record["notes"] for line in (note, "")]
            if section.drawn:
                lines += pictures(f"{record['name'].replace('quality-', 'quality_')}_*")
            lines += [*origin(record), ""]
    lines += ["## How the model looks at pictures", "", ABOUT_ATTENTION, ""]
    lines += [line for name in ATTENTION for line in pictures(name)] or [
        MISSING.format("python -m bench.figures --only attention")
    ]
    return "\n".join(lines).rstrip() + "\n"


def section_of(name: str) -> Section:
    """Where a report belongs."""
    fitting = [(len(n), s) for s in SECTIONS for n in s.names if name.startswith(n)]
    return max(fitting, key=lambda pair: pair[0])[1]


def pictures(pattern: str) -> list[str]:
    """The figures of that name which bench.figures has drawn."""
    files = sorted((PAGE.parent / FIGURES).glob(f"{pattern}.png"))
    return [line for f in files for line in (f"![{f.stem}]({FIGURES}/{f.name})", "")]


# -- rows as tables -------------------------------------------------------------------------------


def as_they_are(record: Record) -> list[Row]:
    """All columns, policies in short."""
    return [
        {**row, "policy": short(row["policy"])} if "policy" in row else row for row in rows(record)
    ]


def rows(record: Record) -> list[Row]:
    """The rows of a report."""
    found: list[Row] = record["rows"]
    return found


def short(spec: str) -> str:
    """A policy's spec without the parameters that have their defaults; as it is if unknown.

    >>> short("avl:secondary=0.45,core=0.1,every=3,prefill=0.9")
    'avl:core=0.1'
    """
    if "+" in spec:  # joined policies, or a contestant's name
        return "+".join(map(short, spec.split("+")))
    try:
        policy = parse(spec)
    except OptionError:  # a contestant that is no policy, such as transformers
        return spec
    default = type(policy)()
    given = {f.name: getattr(policy, f.name) for f in fields(policy)}  # type: ignore[arg-type]
    changed = [
        f"{key}={value if isinstance(value, str) else 'none' if value is None else f'{value:g}'}"
        for key, value in given.items()
        if value != getattr(default, key)
    ]
    return f"{policy.name}:{','.join(changed)}" if changed else policy.name


QUALITY_COLUMNS = ("task", "policy", "n", "exact", "right", "right - full", "same answer as full")
QUALITY_COLUMNS += ("first difference", "KL", "by line", "stored %", "used %", "MB")


def quality(record: Record) -> list[Row]:
    """The columns that compare policies."""
    return [{key: row.get(key) for key in QUALITY_COLUMNS} for row in as_they_are(record)]


def formats(record: Record) -> list[Row]:
    """The columns that compare formats of the cache."""
    columns = (*QUALITY_COLUMNS[:6], "KL", *FORMAT_COLUMNS)
    return [{key: row.get(key) for key in columns} for row in as_they_are(record)]


FORMAT_COLUMNS = ("picture stored %", "picture read %", "left out %", "values read %")


def split(record: Record) -> list[Row]:
    """A latency report as the paper splits it: one row per batch, gains of its two parts."""
    cells = {(row["model"], row["batch"], row["what"]): row for row in rows(record)}
    found = []
    for model, batch in dict.fromkeys((row["model"], row["batch"]) for row in rows(record)):
        ms = {w: cells[model, batch, w]["attention ms"] for w in WHAT}
        limit = {w: cells[model, batch, w]["limit"] for w in WHAT}
        found.append(
            {
                "sequence": model,
                "batch": batch,
                **{f"{what} ms": ms[what] for what in WHAT},
                "policy ms": cells[model, batch, "ours"]["policy ms"],
                "compression": f"{ms['full'] / ms['compressed']:.2f} x",
                "its limit": f"{1 / limit['compressed']:.2f} x",
                "operator": f"{ms['compressed'] / ms['ours']:.2f} x",
                "its limit ": f"{limit['compressed'] / limit['ours']:.2f} x",
                "ours / full": cells[model, batch, "ours"]["/ full"],
                "95 %": cells[model, batch, "ours"]["95 %"],
            }
        )
    return found


WHAT = ("full", "compressed", "slice", "ours")


# -- what of the paper holds ----------------------------------------------------------------------


def claims(records: Sequence[Record]) -> list[str]:
    """A table of the paper's claims beside what the reports here say."""
    found: list[Row] = []
    for record in records:
        section = section_of(record["name"]).title
        for claim in CLAIMS.get(section, ()):
            found += claim(record)
    found += agreement_claims(PAGE.parent / FIGURES)
    if not found:
        return []
    return ["## What of the paper's claims holds here", "", *table(found), "", ABOUT_CLAIMS, ""]


PUBLISHED_AGREEMENT = {
    "ppci_between_layers": {"top 50%": "below 70 %"},
    "ppci_between_steps": {"top 50%": "stable", "top 30%": "drifts slowly"},
}


def agreement_claims(folder: Path) -> list[Row]:
    """How much layers and steps agree on the best image tokens, from the data of the figures."""
    found = []
    for name, lines in PUBLISHED_AGREEMENT.items():
        path = folder / f"{name}.csv"
        if not path.exists():
            continue
        with path.open(newline="", encoding="utf-8") as file:
            data = list(csv.DictReader(file))
        for line, published in lines.items():
            first, last = float(data[0][line]), float(data[-1][line])
            mean = sum(float(row[line]) for row in data) / len(data)
            found.append(
                {
                    "claim": f"{name.replace('_', ' ')}, {line}".replace("ppci", "agreement"),
                    "published": published,
                    "here": f"{first:.2f} at the first, {last:.2f} at the last, mean {mean:.2f}; "
                    f"by chance {line.removeprefix('top ')}",
                    "from": f"{FIGURES}/{path.name}",
                }
            )
    return found


def memory_claim(record: Record) -> list[Row]:
    """How far our bytes are from the published ones."""
    if "paper_mb" not in rows(record)[0]:
        return []
    differences = [abs(row["difference_%"]) for row in rows(record)]
    close = sum(d <= 2 for d in differences)
    return [
        {
            "claim": "bytes of the cache (table 3)",
            "published": f"{len(differences)} rows",
            "here": f"{close} within 2 %, all within {max(differences):g} %",
            "from": record["name"],
        }
    ]


def latency_claim(record: Record) -> list[Row]:
    """Compression and operator at the smallest and the largest batch."""
    found = []
    for model in dict.fromkeys(row["sequence"] for row in split(record)):
        mine = [row for row in split(record) if row["sequence"] == model]
        ends = [mine[0], mine[-1]] if len(mine) > 1 else mine
        for key, published in (("compression", "1.8 x"), ("operator", "1.1 x")):
            here = ", ".join(f"{row[key]} at batch {row['batch']}" for row in ends)
            found.append(
                {
                    "claim": f"attention faster by {key}",
                    "published": published,
                    "here": f"{here} ({model})",
                    "from": record["name"],
                }
            )
    return found


def whole_step_claim(record: Record) -> list[Row]:
    """A whole decode step of avl beside full, with the limit of its bytes where it was counted."""
    mine = [row for row in rows(record) if short(str(row.get("policy", ""))) == "avl"]
    if not mine or "step / full" not in mine[0]:
        return []
    ends = [mine[0], mine[-1]] if len(mine) > 1 else mine
    here = ", ".join(
        f"{100 * row['step / full']:.0f} % at batch {row['batch']}"
        + (f" (limit {100 * row['limit']:.0f} %)" if "limit" in row else "")
        for row in ends
    )
    name = f"{here}, {record['settings'].get('model', '')}"
    return [
        {
            "claim": "a decode step of avl / full",
            "published": "50.5 %",
            "here": name,
            "from": record["name"],
        }
    ]


def quality_claim(record: Record) -> list[Row]:
    """Which tasks lose by which form of avl, by the interval of the paired difference."""
    found = []
    for row in quality(record):
        if row["policy"].partition(":")[0] != "avl":
            continue
        low, high = (float(x) for x in row["right - full"].split("[")[1].strip("]").split(","))
        verdict = "loses" if high < 0 else "gains: look into it" if low > 0 else "no loss seen"
        found.append(
            {
                "claim": f"{row['policy']} keeps the answers, task {row['task']}",
                "published": "no loss on average",
                "here": f"{verdict}: {row['right - full']} of {cell(row['right'])}",
                "from": record["name"],
            }
        )
    return found


def limit_of_7b(image_tokens: int) -> float:
    """Bytes of a step of avl / full at batch 1: weights, and keys and values of the picture.

    7 billion parameters in 16 bits, 32 layers of 4,096; S45 C30 K3 reads 35 % of a picture's tokens
    in a mean step.

    >>> round(limit_of_7b(576), 2)
    0.99
    """
    weights, picture = 13.2e9, image_tokens * 2 * 32 * 4096 * 2
    return (weights + 0.35 * picture) / (weights + picture)


ABOUT_CLAIMS = f"""The paper's 50.5 % of decode latency comes without its batch, length or GPU. A
step also reads the weights, which no cache policy shortens: with 7 billion parameters in 16 bits at
batch 1 the bytes of a step fall to {limit_of_7b(576):.2f} of full's with a picture of 576 tokens
and to {limit_of_7b(2880):.2f} with one of 2,880. So the figure can only be that of attention alone,
of a large batch, or of a baseline that copies its cache. Attention and whole steps are therefore
reported apart, each with its ratio of bytes as the limit."""

SECTIONS = (
    Section(
        "Quality by policy",
        "Held-out drawn pictures and printed pages of the embedded model; the paper measures on "
        "photographs and scanned documents with 7 to 13 billion parameters.",
        ("quality",),
        "python -m bench.quality",
        quality,
    ),
    Section(
        "Quality by parameter",
        "The paper's figures 9 and 10: one parameter moves, the others stay.",
        ("quality-secondary", "quality-core", "quality-text", "quality-prefill"),
        "python -m bench.quality --sweep secondary",
        quality,
        drawn=True,
    ),
    Section(
        "Formats of the cache",
        "Pictures in few bits, alone, with values left unread and with A-VL's core list; bytes "
        "stored and read are those of the picture beside 16 bits.",
        ("quality-formats",),
        "python -m bench.quality --group formats",
        formats,
    ),
    Section(
        "Features of cross layers",
        "The small Llama-3.2-Vision on the same pages: `trimmed`, formats, A-VL's core. Steps are "
        "of a fifth of the 11B, over pictures of 6,404 features.",
        ("quality-features", "sideways", "sideways-q4"),
        "python -m bench.quality --group features",
        as_they_are,
    ),
    Section(
        "Formats on a trained decoder, and over two turns",
        "The beginning of a text stands for a picture (SmolLM2-135M); a second question about the "
        "same page (embedded model).",
        ("prefix", "turns"),
        "python -m bench.prefix",
        as_they_are,
    ),
    Section(
        "Attention in formats",
        "One layer over a list of all tokens, 32 heads of 128.",
        ("formats", "formats-1", "formats-avx2", "formats-1-avx2"),
        "python -m bench.formats",
        as_they_are,
    ),
    Section(
        "Bytes of the cache",
        "The paper's table 3 beside what this cache counts, and peaks and steps of a small model.",
        ("memory",),
        "python -m bench.memory",
        as_they_are,
    ),
    Section(
        "Attention alone, by batch size",
        "The paper's split of decode latency. Compression: only what S keeps is stored, and all of "
        "it is attended. Operator: of that, the core alone is read at sparse steps, in place. Its "
        "alternative, slice, copies the core out first. Limits are ratios of bytes.",
        ("latency",),
        "python -m bench.latency",
        split,
        drawn=True,
    ),
    Section(
        "Whole decode steps, by batch size",
        "Everything a step does, weights included, in this engine. With `avl:core=none` among the "
        "policies it splits as attention does: compression alone, then the operator as well.",
        ("batch",),
        "python -m bench.batch --cache full --cache avl:core=none --cache avl",
        as_they_are,
    ),
    Section(
        "Whole steps at a 7B's width",
        "Eight layers with as many heads of keys as of queries, no prefill.",
        ("headline",),
        "python -m bench.headline",
        as_they_are,
    ),
    Section(
        "Videos",
        "A LongVA of 0.5B with random weights, whose frames are 144 tokens each.",
        ("video", "video-avx2"),
        "python -m bench.video",
        as_they_are,
    ),
    Section(
        "Clips",
        "Four drawn frames as four pictures, asked of the embedded model once it has learned them.",
        ("clips",),
        "python -m bench.clips runs/clips/model",
        as_they_are,
    ),
    Section(
        "A batch on a cluster",
        "Workers of one core each on one machine; a worker dies, and a job is killed and goes on.",
        ("spread",),
        "python -m bench.spread",
        as_they_are,
    ),
    Section(
        "Decoding beside transformers",
        "The same weights, prompt, picture and forced length, in turn.",
        ("decode",),
        "python -m bench.decode",
        as_they_are,
    ),
    Section(
        "Servers",
        "Over HTTP on one machine, clients among what it has to do: beside `transformers serve`, "
        "over text beside llama.cpp's server in Python, and a second question about a picture.",
        ("serve", "second"),
        "python -m bench.serve",
        as_they_are,
    ),
    Section(
        "From a cold process to the first token",
        "Each run in a process that starts with nothing imported.",
        ("load",),
        "python -m bench.load",
        as_they_are,
    ),
    Section(
        "Kernels",
        "One layer's attention and one linear layer of a 7B decoder.",
        ("kernels",),
        "python -m bench.kernels",
        as_they_are,
    ),
    Section("Further measurements", "", ("",), "make gpu-check", as_they_are),
)
CLAIMS = {
    "Quality by policy": (quality_claim,),
    "Bytes of the cache": (memory_claim,),
    "Attention alone, by batch size": (latency_claim,),
    "Whole decode steps, by batch size": (whole_step_claim,),
}


if __name__ == "__main__":
    main()
