"""The steps of the images, which are not built here."""

import re
import tomllib

from tests.spawn import ROOT

FOLDER = ROOT / "containers"


def instructions(text):
    """A Dockerfile's instructions, with their continuation lines, without comments."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [line.split(maxsplit=1) for line in "\n".join(lines).replace("\\\n", " ").splitlines()]


def sections(text):
    """An Apptainer definition's header and sections, each the words of its lines, without comments."""
    parts = re.split(r"^%(\w+)$", text, flags=re.MULTILINE)
    named = dict(zip(["header", *parts[1::2]], parts[::2], strict=True))
    return {
        name: [line.split() for line in part.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        for name, part in named.items()
    }


def commands(text):
    return [" ".join(command.split()) for command in text.split("&&")]


def test_both_images_do_the_same_on_the_same_pinned_base():
    steps = instructions((FOLDER / "Dockerfile").read_text())
    definition = sections((FOLDER / "unimo3.def").read_text())
    assert {word for word, _ in steps} <= {"FROM", "WORKDIR", "COPY", "RUN"}
    ((_, base),) = [step for step in steps if step[0] == "FROM"]
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", base)
    assert definition["header"] == [["Bootstrap:", "docker"], ["From:", base]]

    copied = [source for word, names in steps if word == "COPY" for source in names.split()[:-1]]
    assert [source for source, target in definition["files"]] == copied
    assert all(target == f"/opt/unimo3/{source}" for source, target in definition["files"])
    assert all((ROOT / source).exists() for source in copied)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {package.removesuffix("*") for package in packages} | {"pyproject.toml", "README.md", "LICENSE"} <= {*copied}
    not_ignored = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert not_ignored == {*copied}

    ((_, run),) = [step for step in steps if step[0] == "RUN"]
    assert ("WORKDIR", "/opt/unimo3") in [tuple(step) for step in steps]
    variables, *post = [" ".join(words) for words in definition["post"]]
    assert variables.startswith(". /.singularity.d/env/")
    assert post == ["cd /opt/unimo3", *commands(run)]


def test_what_pip_reads_is_copied_or_made_of_pinned_requirements():
    ((_, run),) = [step for step in instructions((FOLDER / "Dockerfile").read_text()) if step[0] == "RUN"]
    select, install, _ = commands(run)
    pattern, source, made = re.fullmatch(r"grep --extended-regexp '(.*)' (\S+) > (\S+)", select).groups()
    chosen = [line for line in (ROOT / source).read_text().splitlines() if re.search(pattern, line)]
    names = re.search(r"\((.*)\)", pattern)[1].split("|")
    assert [line.split("==")[0] for line in chosen] == names
    assert not any("[" in line for line in chosen)  # pip takes no extras in constraints
    assert install.split()[-3:] == ["--constraint", made, "."]
