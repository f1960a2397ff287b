"""Documents name files, names and commands that exist; the tour's path, code and numbers hold."""

import ast
import importlib.util
import re
import sys
import traceback
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bench.common import ROOT
from bench.house import path_of
from bench.memory import Shape as Counted
from bench.memory import run_prefill, seeded, shape_report
from engine import Engine
from engine.cache.prefill import Prefill
from engine.loading import families
from engine.ops import formats, native
from engine.policies.avl import Avl
from engine.policies.specs import POLICIES, parse
from engine.running import taped
from tests import every_policy, test_formats
from tests.checkpoints import Shape, edit_json, write_llava
from tests.noise import noise

README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "cuda").rglob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
TOUR = ROOT / "docs" / "tour.md"
SUFFIXES = "py|cuh|cu|cpp|h|md|js|css|html|toml"
REFERENCE = re.compile(rf"`([\w./-]+\.(?:{SUFFIXES}))(?::([\w.]+))?`")
COMMAND = re.compile(
    r"python -m ((?:bench|training|tests)\.\w+)((?:\s+--[\w-]+(?:[ =][^\s`-]\S*)?)*)"
)
MADE_BY_COMMANDS = ("gpu-results/", "build/")


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_files_and_names_in_documents_exist(document: Path) -> None:
    missing = []
    for file, name in REFERENCE.findall(document.read_text(encoding="utf-8")):
        if "/" not in file or file.startswith(MADE_BY_COMMANDS):
            continue  # an example's file, or one that a command makes
        path = ROOT / file if (ROOT / file).exists() else document.parent / file
        if not path.is_file() or (name and not holds(path, name)):
            missing.append(f"{file}:{name}".rstrip(":"))
    assert not missing, f"{document.name} names what is not there: {missing}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_commands_in_documents_exist(document: Path) -> None:
    for module, flags in COMMAND.findall(document.read_text(encoding="utf-8")):
        spec = importlib.util.find_spec(module)
        assert spec is not None, f"{document.name}: python -m {module}"
        assert spec.origin is not None
        source = Path(spec.origin).read_text(encoding="utf-8")
        shared = (ROOT / "bench" / "common.py").read_text() + (
            ROOT / "bench" / "subject.py"
        ).read_text()
        for flag in re.findall(r"--[\w-]+", flags):
            assert f'"{flag}"' in source + shared, f"{document.name}: {module} has no {flag}"


def test_a_name_that_is_not_there_is_found_missing() -> None:
    assert holds(ROOT / "engine" / "policies" / "avl.py", "Avl.retain")
    assert holds(ROOT / "cuda" / "attention.cuh", "attention_kernel")
    for file, name in (
        ("engine/policies/avl.py", "Avl.retained"),
        ("engine/policies/avl.py", "retain"),
        ("cuda/attention.cuh", "attention_kern"),
    ):
        assert not holds(ROOT / file, name)


def test_the_tour_has_the_references_that_are_checked() -> None:
    found = REFERENCE.findall(TOUR.read_text(encoding="utf-8"))
    assert sum(bool(name) for _, name in found) > 40


def test_the_readme_counts_lines_as_they_are() -> None:
    rows = re.findall(r"^\| ((?:[\w/.]+, )*[\w/.]+) \| ([\d,]+) \|", README.read_text(), re.M)
    assert len(rows) > 10
    for names, stated in rows:
        counted = sum(map(lines_in, in_full(names)))
        assert abs(counted - int(stated.replace(",", ""))) <= 0.1 * counted, (names, counted)


def in_full(names: str) -> list[Path]:
    """`a/b.py, c.py` names two files of one folder."""
    paths: list[Path] = []
    for name in names.split(", "):
        here = paths[-1].parent / name if paths and "/" not in name else ROOT / name
        paths.append(here)
    return paths


def lines_in(path: Path) -> int:
    """Lines of a file, or of a folder's sources."""
    files = [path]
    if path.is_dir():
        kinds = (".py", ".h", ".cpp", ".cu", ".cuh", ".md", ".txt")
        files = [file for file in path.rglob("*") if file.suffix in kinds]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def holds(path: Path, name: str) -> bool:
    """Whether a file defines a name: in Python at its own level or in the class named before it."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return re.search(rf"\b{re.escape(name)}\b", text) is not None
    return name in names_of(text)


@cache
def names_of(source: str) -> frozenset[str]:
    """Functions, classes and variables of a module, members as ``Class.member``."""
    found: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", 0)]
            found.update(prefix + t.id for t in targets if isinstance(t, ast.Name))

    visit(ast.parse(source).body, "")
    return frozenset(found)


# -- the tour's example and code ------------------------------------------------------------------


def test_the_numbers_of_the_tour_are_the_caches_own() -> None:
    tour = TOUR.read_text(encoding="utf-8")
    shape = Counted("tour", layers=2, heads=32, system=35, image=576, text=22)
    counted = shape_report(shape, "avl")
    policy = Avl()
    stored, core, text = counted.stored.mean, counted.core.mean, counted.text.mean
    assert f"35 + {stored:.0f} + {text:.0f} = **{35 + stored + text:.0f}** slots" in tour
    assert f"35 + {core:.0f} + {text:.0f} = **{35 + core + text:.0f}** slots" in tour
    assert f"The other {counted.minor.mean:.0f} image tokens are minor" in tour
    layers = 32 / shape.layers
    assert f"Full: 633 tokens, {layers * counted.bytes_full / 1e6:.1f} MB" in tour
    assert f"Kept: 314 tokens, {layers * counted.bytes_used / 1e6:.1f} MB" in tour
    budget = policy.text_budget(22, 633)
    assert budget is not None
    kept = f"{budget.total - budget.recent} heavy hitters, the {budget.recent} latest"
    assert kept in tour
    assert [policy.text_budget(n, 633).total for n in (22, 29, 30)] == [20, 20, 21]
    assert f"= {int(policy.prefill * 576)} image tokens go on" in tour
    assert f"sequence is {35 + int(policy.prefill * 576) + 22} long" in tour
    steps = [("core", 228), ("core", 228), ("full", 315), ("core", 228)]
    for step, (kind, attended) in enumerate(steps, start=1):
        assert policy.attends_core(step) == (kind == "core")
        assert f"| {step} | {kind} | {attended} |" in tour
    assert policy.reranks(3)


# -- the path, and what is added ------------------------------------------------------------------


@pytest.mark.skipif(not native.loaded(), reason="needs the native module")
def test_the_path_of_the_tour_is_the_one_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files on the stack when a request's first kernel is called, the kernel's after them."""
    engine = Engine.load(device="cpu")
    monkeypatch.setattr(taped, "obstacle", lambda *_: "the plain way is told first")
    crossed: list[str] = []
    run = native.AttentionPlan.run

    def noted(plan: native.AttentionPlan, *given: int) -> None:
        if not crossed:
            crossed.extend(frame.filename for frame in traceback.extract_stack()[:-1])
        run(plan, *given)

    monkeypatch.setattr(native.AttentionPlan, "run", noted)
    engine.generate("What colour is the car?", [ROOT / "examples" / "car.jpg"], max_new_tokens=2)
    inside = [Path(name) for name in crossed if Path(name).is_relative_to(ROOT / "engine")]
    files = [str(path.relative_to(ROOT)) for path in dict.fromkeys(inside)]
    told = path_of(TOUR.read_text(encoding="utf-8"))
    assert told == [*files, "engine/ops/native.py", "cuda/cpu/attention.h"]
    assert len(told) <= 9


def code_of(section: str) -> list[str]:
    """The Python of a section of the tour."""
    tour = TOUR.read_text(encoding="utf-8")
    (found,) = re.findall(rf"^## \d+\. {section}\n(.*?)(?=^## )", tour, re.M | re.S)
    return re.findall(r"```python\n(.*?)```", found, re.S)


def as_module(name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of that name, as if it lay where the tour puts it."""
    module = ModuleType(name)
    module.__package__ = name.rpartition(".")[0]
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(code, "docs/tour.md", "exec"), module.__dict__)
    return module


def test_the_policy_of_the_tour_works(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = code_of("Add a policy")
    policy = as_module("engine.policies.nth", code, monkeypatch).Nth
    monkeypatch.setitem(POLICIES, policy.name, policy)
    every_policy.ask_everything("nth:step=3")
    engine = every_policy.small_engine().with_cache("nth+fastv:layer=1")
    assert engine.policy.spec == "nth:step=2+fastv:layer=1,drop=0.5"
    decoder = seeded(layers=2, heads=4, kv_heads=2, head_dim=16)
    step, _ = run_prefill(decoder, parse("nth"), Prefill, tokens=35 + 16 + 9, image=16, new=1)
    for stored in step.row.layers:
        kept = [*range(35), *range(35, 51, 2), *range(51, 60)]
        assert stored.layout.positions[0].tolist() == kept


def test_the_model_of_the_tour_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, family = code_of("Add a model")
    pooled = as_module("engine.models.pooled", model, monkeypatch).Pooled
    monkeypatch.setattr(families, "Pooled", pooled, raising=False)
    exec(compile(family, "docs/tour.md", "exec"), families.__dict__)
    monkeypatch.setitem(families.FAMILIES, "pooled", families.__dict__.pop("_pooled"))
    folder = write_llava(tmp_path / "pooled", Shape())
    edit_json(folder / "config.json", model_type="pooled")
    engine = Engine.load(folder, device="cpu", dtype="float32", cache="full")
    result = engine.generate("What is this?", [noise(70, 60)], max_new_tokens=4, ignore_eos=True)
    assert (result.image_tokens, len(result.token_ids)) == (Shape().image_tokens // 4, 4)


def test_the_format_of_the_tour_works(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = code_of("Add a number format")
    names = dict(formats.__dict__)
    exec(compile(code, "docs/tour.md", "exec", dont_inherit=True), names)
    row = names["FP8"]
    monkeypatch.setitem(formats.FORMATS, row.name, row)
    assert row.name not in native.codes()
    test_formats.test_what_was_read_is_written_back(row)
    test_formats.test_a_run_takes_its_bytes(row)
    test_formats.test_dot_is_float64s(row)
    x = torch.randn(5, 64)
    assert (row.unpack(row.pack(x)) - x).abs().max() < x.abs().max() / 16
