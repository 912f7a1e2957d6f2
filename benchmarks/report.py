"""A measurement's result as a markdown file that records where, when and with what it was made.

Source: the results of torchtitan and flash-linear-attention, which name hardware, versions and date.
"""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def usable_cores() -> int:
    """Cores this process may run on, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def machine() -> dict[str, str]:
    """What a result depends on besides the code: processor, memory, accelerator, versions, date and commit."""
    facts = {
        "processor": _processor(),
        "cores": str(usable_cores()),
        "threads": str(torch.get_num_threads()),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "Python": platform.python_version(),
    }
    facts |= {package: _version(package) for package in ("torch", "triton", "transformers", "timm", "deepspeed")}
    return facts | {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "commit": _commit()}


def write_report(path: Path, title: str, body_markdown: str) -> None:
    """Write a result, the command that made it and the machine it was measured on.

    Args:
        path: of the file, whose folder is made.
        title: the heading.
        body_markdown: tables and sentences of the measurement.
    """
    facts = "\n".join(f"| {name} | {value} |" for name, value in machine().items())
    measured_on = f"## Measured on\n\n| | |\n| --- | --- |\n{facts}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {title}\n\n```bash\n{_command()}\n```\n\n{body_markdown.strip()}\n\n{measured_on}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        # A result that was appended is no change of what is measured.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!*/results/*")
    except (OSError, subprocess.CalledProcessError):
        return "unknown: no git repository"
    return f"{commit} with uncommitted changes" if changed else commit


def _command() -> str:
    script = Path(sys.argv[0]).resolve()
    if script.is_relative_to(ROOT):
        name = ["-m", ".".join(script.relative_to(ROOT).with_suffix("").parts)]
    else:
        name = [script.name]
    # An absolute path means nothing on another machine.
    arguments = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", *name, *arguments])
