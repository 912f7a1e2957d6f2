"""The commands of the pages name programs and options that exist."""

import importlib
import re
import shlex
import tomllib
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import pytest

from tests.test_docs import PAGES, ROOT

TASKS = ("vqa", "nlvr2", "snli_ve", "retrieval")
MODULE = re.compile(r"(?:pretrain|finetune|slurm|unimo3|benchmarks|experiments)\.[a-z]\w*(?:\.\w+)*")
CONSOLE = {
    name: entry.removesuffix(":main").removesuffix(".__main__")
    for name, entry in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].items()
}
# A job script hands its arguments to a program, as slurm.submit does by the job's name.
JOBS = {
    "pretrain": "pretrain.train",
    "export": "pretrain.export",
    "prepare_shards": "pretrain.prepare_shards",
    **{task: f"finetune.{task}" for task in (*TASKS, "choose")},
}


def commands(page: Path) -> list[list[str]]:
    """The words of each line of a page's bash blocks; a line with a backslash at its end continues on the next."""
    blocks = re.findall(r"^ *```bash$(.*?)^ *```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def programs_of(word: str) -> list[str]:
    """The modules that a word of a command names."""
    script = re.search(r"slurm/(\w+)\.sbatch$", word)
    name = script[1] if script else word
    if name in CONSOLE or name in JOBS:
        return [CONSOLE.get(name) or JOBS[name]]
    if word == "finetune.TASK" or word == "TASK":
        return [JOBS[task] for task in TASKS]
    is_module = MODULE.fullmatch(word) and (ROOT / word.replace(".", "/")).with_suffix(".py").exists()
    return [word] if is_module else []


@cache
def help_of(module: str, *subcommand: str) -> str:
    """The help that a program prints, or one of its subcommands."""
    main = importlib.import_module(f"{module}.__main__" if (ROOT / module).is_dir() else module).main
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as output:
        patch.setattr("sys.argv", [module, *subcommand, "--help"])
        with pytest.raises(SystemExit) as end:
            main()
    assert not end.value.code
    return output.getvalue()


def options_of(words: list[str]) -> set[str]:
    """The options of the programs and subcommands that a command names, with underscores."""
    helps = []
    for program in [program for word in words for program in programs_of(word)]:
        helps.append(help_of(program))
        listed = re.findall(r"^  {([\w,]+)}(?: \.\.\.)?$", helps[-1], flags=re.MULTILINE)
        subcommands = {name for names in listed for name in names.split(",")}
        if program == "finetune.predict":
            subcommands = {*TASKS, "index"}
        if program != "slurm.submit":  # whose jobs are programs
            helps += [help_of(program, word) for word in words if word in subcommands]
    return {option.replace("-", "_") for option in re.findall(r"(?<![\w-])--?[a-zA-Z][\w.-]*", "\n".join(helps))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_programs_and_options_of_commands_exist(page):
    unknown = []
    for words in commands(page):
        first = next((number for number, word in enumerate(words) if programs_of(word)), len(words))
        options = [word.partition("=")[0] for word in words[first:] if re.match(r"--?[a-zA-Z]", word)]
        known = options_of(words[first:])
        unknown += [f"{option} in: {' '.join(words)}" for option in options if option.replace("-", "_") not in known]
    assert unknown == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_complete_training_commands_name_their_data(page):
    for words in commands(page):
        is_training = any("pretrain.train" in programs_of(word) for word in words)
        if is_training and not {"...", "--help", "--print_config"} & {*words}:
            assert {"--config", "--data.train", "--data.tokenizer"} <= {*words}, " ".join(words)
