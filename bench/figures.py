"""Draw the A-VL paper's figures on how a model looks at pictures (1 and 3 to 5), and their data.

python -m bench.figures --model FOLDER --output docs/figures

Every picture of examples/questions.json is described under the full cache, so that what is drawn
is the model's doing and not a policy's. Each figure is written as PNG and as CSV. The numbers are
means over the pictures; a step counts those answers that reach it. Needs matplotlib.
"""

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from bench.common import ROOT
from engine.engine import Engine
from engine.insight.measures import (
    agreement_between_layers,
    agreement_between_steps,
    share_per_layer,
    sparsity_per_layer,
)
from engine.insight.trace import Trace

SHARES = (0.2, 0.3, 0.4, 0.5)
MASSES = (0.5, 0.8, 0.9)
Columns = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", help="folder or hub name (default: the embedded model)")
    parser.add_argument("--questions", type=Path, default=ROOT / "examples" / "questions.json")
    parser.add_argument("--prompt", default="Describe the picture in detail.")
    parser.add_argument("--steps", type=int, default=64, help="longest answer")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "figures")
    options = parser.parse_args()
    engine = Engine.load(options.model, cache="full")
    folder = options.questions.parent
    pictures = [folder / entry["file"] for entry in json.loads(options.questions.read_text())]
    options.output.mkdir(parents=True, exist_ok=True)
    traces = []
    for picture in tqdm(pictures, unit="picture"):
        trace = Trace()
        answer = engine.stream(
            options.prompt, [picture], observer=trace, max_new_tokens=options.steps
        )
        list(answer)
        traces.append(trace)
    for name, (title, x, y, columns) in figures(traces).items():
        write_csv(options.output / f"{name}.csv", x, columns)
        draw(options.output / f"{name}.png", f"{title} ({engine.name})", x, y, columns)
        print(options.output / f"{name}.png")


def figures(traces: Sequence[Trace]) -> dict[str, tuple[str, str, str, Columns]]:
    """Title, axes and lines of every figure; a line's first value stands at ``start_of(x)``."""
    return {
        "attention_by_modality": (
            "Attention by kind of token",
            "decode step",
            "share of attention, mean over layers",
            by_modality(traces),
        ),
        "sparsity_by_layer": (
            "Image tokens that hold a share of the image's attention",
            "layer",
            "share of the image tokens",
            {
                f"{mass:.0%} of the attention": mean_rows(
                    [sparsity_per_layer(trace, 0, mass) for trace in traces]
                )
                for mass in MASSES
            },
        ),
        "ppci_between_layers": (
            "Image tokens that the first layer and a later one rank highest",
            "later layer",
            "share in common (PPCI)",
            {
                f"top {share:.0%}": mean_rows(
                    [agreement_between_layers(t, 0, share)[0, 1:].tolist() for t in traces]
                )
                for share in SHARES
            },
        ),
        "ppci_between_steps": (
            "Image tokens that the first step and a later one rank highest",
            "later decode step",
            "share in common (PPCI), mean over layers",
            {f"top {share:.0%}": between_steps(traces, share) for share in SHARES},
        ),
    }


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


def start_of(x: str) -> int:
    """Number of a line's first value: what is later than the first begins at 1."""
    return 1 if x.startswith("later") else 0


def write_csv(path: Path, x: str, columns: Columns) -> None:
    """One row per place, one column per line."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([x, *columns])
        for number, values in enumerate(zip(*columns.values(), strict=True), start_of(x)):
            writer.writerow([number, *(f"{value:.5f}" for value in values)])


def draw(path: Path, title: str, x: str, y: str, columns: Columns) -> None:
    """Lines told apart by colour and by marker."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours, markers = ("#0072b2", "#e69f00", "#009e73", "#cc79a7"), "os^D"
    figure, axes = pyplot.subplots(figsize=(6.4, 3.8), dpi=100, layout="constrained")
    for (name, values), colour, marker in zip(columns.items(), colours, markers, strict=False):
        places = range(start_of(x), start_of(x) + len(values))
        axes.plot(places, values, color=colour, marker=marker, markersize=4, label=name)
    axes.set(title=title, xlabel=x, ylabel=y, ylim=(0, 1))
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
