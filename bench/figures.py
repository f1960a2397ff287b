"""Draw the A-VL paper's figures from this engine, and write their data as CSV.

    python -m bench.figures                       all that can be drawn
    python -m bench.figures --only attention --model FOLDER
    python -m bench.figures --only results        what bench/results holds

Figures 1 and 3 to 5, on how a model looks at pictures, are measured here: every picture of
examples/questions.json is described under the full cache, so that what is drawn is the model's
doing and not a policy's. They are means over the pictures; a step counts those answers that reach
it. Figure 8 is drawn from what `python -m bench.latency` has measured, figures 9 and 10 from
`python -m bench.quality --sweep ...`; what has not been measured is named and left out. Needs
matplotlib (the extra `train`).
"""

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.common import RESULTS, ROOT, progress
from bench.quality import SWEEPS
from engine.engine import Engine
from engine.insight.measures import (
    agreement_between_layers,
    agreement_between_steps,
    share_per_layer,
    sparsity_per_layer,
)
from engine.insight.trace import Trace
from engine.policies.avl import Avl
from engine.policies.policy import FREED, PLAIN
from engine.policies.sift import Sift
from engine.policies.specs import parse
from engine.policies.zipvl import ZipVl

SHARES = (0.2, 0.3, 0.4, 0.5)
MASSES = (0.5, 0.8, 0.9)
PARAMETERS = {
    "secondary": "S, share of the image tokens that is stored",
    "core": "C, share of the image tokens that is attended at every step",
    "text": "T, share of the text after the picture that is kept",
    "prefill": "P, share of the image tokens that goes on after the second layer",
}
Columns = dict[str, list[float]]


@dataclass(frozen=True)
class Figure:
    """Lines over the same places; the vertical axis ends at ``top`` (None: above the data)."""

    title: str
    x: str
    y: str
    places: list[float]
    columns: Columns
    top: float | None = 1.0


@dataclass(frozen=True)
class Panels:
    """Panels side by side over the same ``x``: for each, lines of points in their own places."""

    x: str
    y: str
    panels: dict[str, dict[str, list[tuple[float, float]]]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("attention", "results"))
    parser.add_argument("--model", help="folder or hub name (default: the embedded model)")
    parser.add_argument("--questions", type=Path, default=ROOT / "examples" / "questions.json")
    parser.add_argument("--prompt", default="Describe the picture in detail.")
    parser.add_argument("--steps", type=int, default=64, help="longest answer")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of measurements")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "figures")
    options = parser.parse_args()
    if find_spec("matplotlib") is None:
        parser.error("needs matplotlib: pip install matplotlib, or this project with [train]")
    drawn: dict[str, Figure] = {}
    if options.only != "results":
        engine = Engine.load(options.model, cache="full")
        drawn |= attention_figures(watch(engine, options), engine.name)
    if options.only != "attention":
        drawn |= result_figures(options.results)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        write_csv(options.output / f"{name}.csv", figure)
        draw(options.output / f"{name}.png", figure)
        print(options.output / f"{name}.png")
    if options.only != "attention":
        for name, panels in quality_by_bytes(options.results).items():
            write_points(options.output / f"{name}.csv", panels)
            draw_panels(options.output / f"{name}.png", panels)
            print(options.output / f"{name}.png")


# -- how a model looks at pictures ----------------------------------------------------------------


def watch(engine: Engine, options: argparse.Namespace) -> list[Trace]:
    """What the model attended while it described every picture."""
    folder, traces = options.questions.parent, []
    questions = json.loads(options.questions.read_text(encoding="utf-8"))
    for entry in progress(questions, "pictures"):
        traces.append(Trace())
        picture = [folder / entry["file"]]
        limit = {"max_new_tokens": options.steps}
        list(engine.stream(options.prompt, picture, observer=traces[-1], **limit))
    return traces


def attention_figures(traces: Sequence[Trace], model: str) -> dict[str, Figure]:
    """Figures 1 and 3 to 5."""
    shares = by_modality(traces)
    sparse = {
        f"{mass:.0%} of the attention": mean_rows([sparsity_per_layer(t, 0, mass) for t in traces])
        for mass in MASSES
    }
    layers = {
        f"top {share:.0%}": mean_rows(
            [agreement_between_layers(t, 0, share)[0, 1:].tolist() for t in traces]
        )
        for share in SHARES
    }
    steps = {f"top {share:.0%}": between_steps(traces, share) for share in SHARES}
    common = "share in common (PPCI)"
    return {
        "attention_by_modality": Figure(
            f"Attention by kind of token ({model})",
            "decode step",
            "share of attention, mean over layers",
            count_from(0, shares),
            shares,
        ),
        "sparsity_by_layer": Figure(
            f"Image tokens that hold a share of the image's attention ({model})",
            "layer",
            "share of the image tokens",
            count_from(0, sparse),
            sparse,
        ),
        "ppci_between_layers": Figure(
            f"Image tokens that the first layer and a later one rank highest ({model})",
            "later layer",
            common,
            count_from(1, layers),
            layers,
        ),
        "ppci_between_steps": Figure(
            f"Image tokens that the first step and a later one rank highest ({model})",
            "later decode step",
            common + ", mean over layers",
            count_from(1, steps),
            steps,
        ),
    }


def count_from(first: int, columns: Columns) -> list[float]:
    """Places of lines that begin at ``first``."""
    return [float(n) for n in range(first, first + len(next(iter(columns.values()))))]


def by_modality(traces: Sequence[Trace]) -> Columns:
    """Shares of system, image, instruction and output at every step (figure 1)."""
    names = ("system", "image", "instruction", "output")
    rows: dict[str, list[list[float]]] = {name: [] for name in names}
    for trace in traces:
        layers = [share_per_layer(trace, number) for number in range(len(trace.passes))]
        for name in names:
            rows[name].append([sum(s[name] for s in step) / len(step) for step in layers])
    return {name: mean_rows(found) for name, found in rows.items()}


def between_steps(traces: Sequence[Trace], share: float) -> list[float]:
    """PPCI of the prefill's last token with every later step, mean over layers (figure 5)."""
    return mean_rows(
        [
            mean_rows(
                [
                    agreement_between_steps(trace, layer, share)
                    for layer in range(len(trace.passes[0]))
                ]
            )
            for trace in traces
        ]
    )


def mean_rows(rows: Sequence[Sequence[float]]) -> list[float]:
    """Mean of each place over the rows that reach it.

    >>> mean_rows([[1.0, 2.0, 5.0], [3.0, 4.0]])
    [2.0, 3.0, 5.0]
    """
    longest = max(map(len, rows))
    reached = [[row[n] for row in rows if n < len(row)] for n in range(longest)]
    return [sum(values) / len(values) for values in reached]


# -- what has been measured -----------------------------------------------------------------------


def result_figures(folder: Path) -> dict[str, Figure]:
    """Figures 8 to 10, as far as ``folder`` holds their measurements."""
    drawn: dict[str, Figure] = {}
    for path in sorted(folder.glob("latency*.json")):
        drawn |= latency_figures(path.stem, read(path))
    if not drawn:
        print("not drawn: latency by batch size; measure it with: python -m bench.latency")
    for sweep in SWEEPS:
        path = folder / f"quality-{sweep}.json"
        if path.exists():
            drawn |= dict(sweep_figures(sweep, read(path)))
        else:
            print(f"not drawn: {sweep}; measure it with: python -m bench.quality --sweep {sweep}")
    return drawn


def read(path: Path) -> dict[str, Any]:
    """A report of a benchmark."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def latency_figures(name: str, record: dict[str, Any]) -> dict[str, Figure]:
    """Figure 8 for every sequence of a latency report: full, slice and ours by batch size."""
    machine, settings, rows = record["machine"], record["settings"], record["rows"]
    where = machine["gpu"] if settings["device"] == "cuda" else machine["cpu"]
    figures = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        lines: dict[str, dict[int, float]] = {"full": {}, "slice": {}, "ours": {}}
        for row in rows:
            if row["model"] == model and row["what"] in lines:
                lines[row["what"]][row["batch"]] = row["attention ms"]
        figures[f"{name}_{model.lower().replace('.', '_')}"] = Figure(
            f"Attention of one layer, {model}, {settings['dtype']}, {where}",
            "batch size",
            "ms per step",
            [float(batch) for batch in lines["full"]],
            {line: list(values.values()) for line, values in lines.items()},
            top=None,
        )
    return figures


def sweep_figures(sweep: str, record: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """One of figures 9 and 10 for each task: quality by a parameter, beside the full cache."""
    # Reports of policies that had fewer parameters then spell them otherwise.
    right = {(row["task"], parse(row["policy"]).spec): row["right"] for row in record["rows"]}
    lines = {
        name: {share: parse(spec).spec for share, spec in line.items()}
        for name, line in SWEEPS[sweep].items()
    }
    places = list(next(iter(lines.values())))
    for task in dict.fromkeys(row["task"] for row in record["rows"]):
        columns = {
            name: [right[task, spec] for spec in line.values()] for name, line in lines.items()
        }
        columns["full cache"] = [right[task, "full"]] * len(places)
        settings = record["settings"]
        yield (
            f"quality_{sweep}_{task}",
            Figure(
                f"Quality, task {task}, {settings['pages per task']} held-out pages, "
                f"{settings['model']}",
                PARAMETERS[sweep],
                "share right",
                places,
                columns,
            ),
        )


TITLES = {"read": "whole pages", "field": "single fields", "describe": "scenes' objects"}


def quality_by_bytes(folder: Path) -> dict[str, Panels]:
    """What answers are worth by the picture's bytes that are stored, and that a step reads."""
    paths = [folder / f"quality-{group}.json" for group in ("formats", "bytes")]
    if not all(path.exists() for path in paths):
        print("not drawn: quality by bytes; measure it with: python -m bench.quality --group bytes")
        return {}
    rows = {(row["task"], row["policy"]): row for path in paths for row in read(path)["rows"]}
    figures = {}
    for what in ("stored", "read"):
        panels: dict[str, dict[str, list[tuple[float, float]]]] = {t: {} for t in TITLES.values()}
        for (task, spec), row in rows.items():
            line = panels[TITLES[task]].setdefault(family(spec), [])
            # H2O and SnapKV take pictures for text: of them it is the share of all tokens.
            share = row[f"picture {what} %"] or row["stored %" if what == "stored" else "used %"]
            line.append((share, row["right"]))
        ordered = {
            title: {name: sorted(points) for name, points in lines.items()}
            for title, lines in panels.items()
        }
        x = f"picture's bytes {what}, % of 16 bits"
        figures[f"quality_by_bytes_{what}"] = Panels(x, "share right", ordered)
    return figures


def family(spec: str) -> str:
    """Which line of a figure a policy belongs to."""
    policy = parse(spec)
    if isinstance(policy, Sift):
        return "sift" if policy.skip else "few bits, all values read"
    if isinstance(policy, ZipVl):
        return "zipvl v2" if policy.minor == FREED else "zipvl v1"
    if not isinstance(policy, Avl):
        return policy.name
    if (policy.format, policy.minor) != (PLAIN, FREED):
        return "avl in formats"
    return "avl, S alone" if policy.core is None else "avl"


# -- on paper -------------------------------------------------------------------------------------


def write_csv(path: Path, figure: Figure) -> None:
    """One row per place, one column per line."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([figure.x, *figure.columns])
        for place, *values in zip(figure.places, *figure.columns.values(), strict=True):
            writer.writerow([f"{place:g}", *(f"{value:.5f}" for value in values)])


def draw(path: Path, figure: Figure) -> None:
    """Lines told apart by colour and by marker."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours, markers = ("#0072b2", "#e69f00", "#009e73", "#cc79a7"), "os^D"
    picture, axes = pyplot.subplots(figsize=(6.4, 3.8), dpi=100, layout="constrained")
    lines = zip(figure.columns.items(), colours, markers, strict=False)
    for (name, values), colour, marker in lines:
        axes.plot(figure.places, values, color=colour, marker=marker, markersize=4, label=name)
    axes.set(title=figure.title, xlabel=figure.x, ylabel=figure.y)
    axes.set_ylim(0, figure.top)
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    picture.savefig(path)
    pyplot.close(picture)


def write_points(path: Path, figure: Panels) -> None:
    """One row per point."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["panel", "line", figure.x, figure.y])
        for panel, lines in figure.panels.items():
            for line, points in lines.items():
                writer.writerows([panel, line, f"{x:g}", f"{y:g}"] for x, y in points)


def draw_panels(path: Path, figure: Panels) -> None:
    """The full cache is a level line; points of a method are joined."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = {"figsize": (12, 4.2), "dpi": 100, "layout": "constrained"}
    picture, many = pyplot.subplots(1, len(figure.panels), **size)
    names = list(dict.fromkeys(name for lines in figure.panels.values() for name in lines))
    handles = {}
    for axes, (title, lines) in zip(many, figure.panels.items(), strict=True):
        handles["full"] = axes.axhline(lines["full"][0][1], color="black", linewidth=1)
        for number, name in enumerate(names):
            if name in lines and name != "full":
                look = {"marker": "os^Dv<>Ph*Xdp"[number % 13], "color": f"C{number % 10}"}
                drawn = axes.plot(*zip(*lines[name], strict=True), markersize=4, lw=1, **look)
                handles[name] = drawn[0]
        axes.set(title=title, xlabel=figure.x, ylabel=figure.y, ylim=(0, 1.02))
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
    picture.legend(handles.values(), handles, fontsize=8, loc="outside right upper")
    picture.savefig(path)
    pyplot.close(picture)


if __name__ == "__main__":
    main()
