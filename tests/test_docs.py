"""The pages for readers: links resolve, code blocks name a language, table cells are short, words are the field's."""

import ast
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "slurm" / "README.md",
    ROOT / "containers" / "README.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "experiments" / "README.md",
    ROOT / "experiments" / "cross_layer_design.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
RESULTS = sorted(path for folder in ("benchmarks", "experiments") for path in (ROOT / folder / "results").glob("*.md"))
MAX_CELL = 120
# Words that are wrong in any meaning; CONTRIBUTING.md lists the most frequent with what to write instead. Formats whose
# names are older contain some.
BANNED = re.compile(
    r"\b(faults?|mend(s|ed|ing)?|told|tells|said|says?|settle[sd]?|beside|anew|likewise|taken up|for ever|at hand|borne"
    r"|bears? with|aside|passed over|left out|(go|goes|going|went|gone) on|whole(?! numbers?)|served"
    r"|(a|the|its|their|whose) shares?|(?<!in )(?<!'s )places?(?! of)|claims?|booking|rivals?|patiently"
    r"|unhurt|doomed|strangers?|cut(ting)? short|cutting in|kept|figures|holds? up)\b",
    re.IGNORECASE,
)
BANNED_NAMES = {"found", "own", "told", "given", "said", "kept", "share", "shares", "place", "places", "whole"}
OLD_FORMATS = re.compile("goes_on")
FOLDERS = ("unimo3", "pretrain", "finetune", "slurm", "benchmarks", "experiments", "examples", "docs", "tests")
CODE = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".sh", ".sbatch", ".cpp", ".yaml") and path != Path(__file__)
]


def lines_outside_code(page: Path) -> list[str]:
    """A page's lines, without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL).splitlines()


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = [line.lstrip("# ") for line in lines_outside_code(page) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page):
    links = re.findall(r"\]\(([^)\s]+)\)", "\n".join(lines_outside_code(page)))
    for link in [link for link in links if "://" not in link]:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page):
    top = "|".join(folder.name for folder in ROOT.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    named = set(re.findall(rf"`((?:{top})/[\w./-]+\.(?:py|md|sh|sbatch|json|yaml|cpp))(?::[^`]*)?`", page.read_text()))
    written = {"slurm/site.env", "slurm/bad_nodes.jsonl", "slurm/history.jsonl"}
    assert [name for name in sorted(named - written) if "NAME" not in name and not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", [*PAGES, *RESULTS], ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_name_a_language(page):
    fences = re.findall(r"^```(.*)$", page.read_text(), flags=re.MULTILINE)
    assert len(fences) % 2 == 0
    assert all(fences[::2]), fences[::2]
    assert [
        line for line in lines_outside_code(page) if re.match(r" {4}(\.venv|python|make|sbatch|import) ?", line)
    ] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_table_cells_are_short(page):
    rows = [line for line in lines_outside_code(page) if line.startswith("|")]
    cells = [cell.strip() for row in rows for cell in re.split(r"(?<!\\)\|", row)]
    assert [cell for cell in cells if len(cell) > MAX_CELL] == []


def test_what_counts_as_what_is_one_table():
    page = (ROOT / "docs" / "data.md").read_text()
    section = page.split("\n## What counts as what\n")[1].split("\n## ")[0]
    header, _, *rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if "|" in line
    ]
    assert header == ["kind", "input", "counts as", "what happens"]
    assert {len(row) for row in rows} == {4}
    assert all(all(row) for row in rows)
    assert {row[0] for row in rows} >= {"image", "text", "identity", "duplicate", "file"}


@pytest.mark.parametrize("page", [*PAGES, *RESULTS], ids=lambda page: str(page.relative_to(ROOT)))
def test_words_are_the_fields(page):
    # Quoted text is what a program prints or a name.
    lines = [re.sub(r"`[^`]*`", "", line) for line in lines_outside_code(page)]
    if page.name == "CONTRIBUTING.md":
        lines = [line for line in lines if not line.startswith("|")]
    assert [line for line in lines if BANNED.search(line)] == []


def test_words_in_code_are_the_fields():
    banned = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in CODE
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if BANNED.search(OLD_FORMATS.sub("", line).replace("_", " "))
    ]
    assert banned == []


def test_names_of_variables_are_the_fields():
    banned = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {name}"
        for path in CODE
        if path.suffix == ".py"
        for node in ast.walk(ast.parse(path.read_text()))
        if (name := bound_name(node)) in BANNED_NAMES
    ]
    assert banned == []


def test_the_models_picture_is_what_its_script_draws():
    script = ROOT / "docs" / "pictures" / "model.py"
    assert script.with_suffix(".svg").read_text() == runpy.run_path(str(script))["draw"]()


def test_names_of_tests_are_at_most_70_characters():
    names = [name for path in CODE for name in re.findall(r"^ *def (test_\w+)", path.read_text(), flags=re.MULTILINE)]
    assert len(names) > 1000
    assert [name for name in names if len(name) > 70] == []


def bound_name(node):
    """The name that a node of a program binds, if any."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return node.attr
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name.lower()
    return node.arg if isinstance(node, ast.arg) else None
