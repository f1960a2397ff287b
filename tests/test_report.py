"""The page of results: it is what the committed measurements say, and says it correctly."""

import json
from pathlib import Path

import pytest

from bench.common import RESULTS
from bench.report import PAGE, agreement_claims, claims, read_all, render, section_of, short, split


def test_the_committed_page_is_what_the_generator_writes() -> None:
    again = "docs/results.md is not what bench/results says: run python -m bench.report"
    assert PAGE.read_text(encoding="utf-8") == render(read_all(RESULTS)), again


def test_every_number_of_a_report_reaches_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for record in read_all(RESULTS):
        assert f"### {record['name']}\n" in page
        assert record["commit"] in page


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_committed_report_says_where_it_comes_from(path: Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    assert {"name", "commit", "machine", "versions", "settings", "rows", "notes"} <= set(record)
    assert record["name"] == path.stem
    assert "dtype" in record["settings"]
    assert path.with_suffix(".md").exists()


def report(name: str, rows: list[dict[str, object]]) -> dict[str, object]:
    return {"name": name, "rows": rows, "settings": {"model": "toy"}}


def test_gains_of_compression_and_operator_multiply_to_ours() -> None:
    times = {"full": 8.0, "compressed": 4.0, "slice": 6.0, "ours": 2.0}
    bytes_ = {"full": 1.0, "compressed": 0.5, "slice": 0.4, "ours": 0.4}
    rows = [
        {"model": "m", "batch": batch, "what": what, "attention ms": batch * ms}
        | {"limit": bytes_[what], "policy ms": 0.1, "/ full": ms / 8, "95 %": "0-1"}
        for batch in (1, 32)
        for what, ms in times.items()
    ]
    one, many = split(report("latency", rows))
    assert (one["compression"], one["operator"], one["ours / full"]) == ("2.00 x", "2.00 x", 0.25)
    assert (one["its limit"], one["its limit "]) == ("2.00 x", "1.25 x")
    assert (many["batch"], many["slice ms"]) == (32, 192.0)
    said = "\n".join(claims([report("latency", rows)]))
    assert "2.00 x at batch 1, 2.00 x at batch 32 (m)" in said


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ("-0.0500 [-0.0700, -0.0300]", "loses"),
        ("-0.0050 [-0.0200, +0.0100]", "no loss seen"),
        ("+0.0500 [+0.0200, +0.0900]", "gains: look into it"),
    ],
)
def test_a_loss_of_quality_is_said(interval: str, verdict: str) -> None:
    row = {"task": "read", "policy": "avl", "right": 0.9, "right - full": interval}
    assert f"| {verdict}: {interval} of 0.9 |" in "\n".join(claims([report("quality", [row])]))


def test_agreement_stands_beside_what_chance_would_give(tmp_path: Path) -> None:
    (tmp_path / "ppci_between_steps.csv").write_text(
        "later decode step,top 20%,top 30%,top 40%,top 50%\n1,0,0.4,0,0.9\n2,0,0.2,0,0.7\n"
    )
    best, core = agreement_claims(tmp_path)
    assert best["here"] == "0.90 at the first, 0.70 at the last, mean 0.80; by chance 50%"
    assert core["here"] == "0.40 at the first, 0.20 at the last, mean 0.30; by chance 30%"


def test_reports_find_their_section_by_the_longest_name() -> None:
    titles = [section_of(name).title for name in ("quality", "quality-core", "batch-x", "gpu-new")]
    assert titles == [
        "Quality by policy",
        "Quality by parameter",
        "Whole decode steps, by batch size",
        "Further measurements",
    ]


def test_policies_are_named_by_what_is_not_default() -> None:
    assert short("avl:secondary=0.45,core=0.10,every=3,text=1") == "avl:core=0.1,text=1"
    assert short("avl:core=none") == "avl:core=none"
    assert short("full") == "full"
    assert short("transformers") == "transformers"
