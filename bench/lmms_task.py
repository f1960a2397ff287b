"""Drawn pages as a task of lmms-eval, and the check of what it wrote: see docs/reproduce.md.

    python -m bench.lmms_task write FOLDER [--pages 40]
    lmms-eval --model openai --model_args ... --tasks drawn_pages --include_path FOLDER ...
    python -m bench.lmms_task check OUTPUT --answers 40

lmms-eval ends with 0 whatever has happened, and writes failed requests as answers: the check reads
the samples, counts those, and says how many answers are right.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from training.evaluate import questions_of

FAILED = "LMMS_EVAL_REQUEST_FAILED"
TASK = """task: drawn_pages
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 32
  temperature: 0
  do_sample: false
process_results: !function utils.process_results
metric_list:
  - metric: exact
    aggregation: !function utils.mean
    higher_is_better: true
"""
UTILS = """from PIL import Image


def doc_to_visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    return {"exact": float(results[0].strip() == doc["answer"])}


def mean(values):
    return sum(values) / len(values)
"""


def write(folder: Path, pages: int) -> None:
    """A task of single fields: pictures, questions, what is right."""
    folder.mkdir(parents=True)
    lines = []
    for number, (page, question) in enumerate(questions_of("field", pages, "test")):
        path = (folder / f"{number}.png").resolve()
        page.image.save(path)
        entry = {"image": str(path), "question": question.text, "answer": question.answer}
        lines.append(json.dumps(entry))
    data = folder / "data.jsonl"
    data.write_text("\n".join(lines) + "\n")
    (folder / "drawn_pages.yaml").write_text(TASK.format(data=data.resolve()))
    (folder / "utils.py").write_text(UTILS)


def check(output: Path, answers: int) -> int:
    """Whether all answers are there and none is a failure; says how many are right."""
    samples = [
        json.loads(line)
        for path in sorted(output.rglob("*samples*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    failed = sum(FAILED in json.dumps(sample) for sample in samples)
    right = sum(float(sample["exact"]) for sample in samples)
    print(f"{len(samples)} answers, {failed} failed requests, {right:.0f} exactly right")
    return int(len(samples) != answers or failed > 0)


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("write", "check"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pages", type=int, default=40)
    parser.add_argument("--answers", type=int, default=40)
    args = parser.parse_args()
    if args.what == "write":
        write(args.folder, args.pages)
        return 0
    return check(args.folder, args.answers)


if __name__ == "__main__":
    sys.exit(main())
