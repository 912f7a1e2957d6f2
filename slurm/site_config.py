"""A site's settings from slurm/site.env, for submitting jobs there.

Source: none.
"""

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from unimo3.errors import ConfigError

_DEFAULT = Path("slurm") / "site.env"


@dataclass(frozen=True)
class Site:
    """A site's settings.

    Attributes:
        sbatch_options: of training jobs.
        cpu_options: of jobs that need no GPU.
    """

    ranks_per_node: int
    sbatch_options: list[str]
    cpu_options: list[str] = field(default_factory=list)


def site_file() -> Path:
    """Where they are: UNIMO3_SITE in the environment, or slurm/site.env of the folder in which jobs run."""
    return Path(os.environ.get("UNIMO3_SITE", "") or _DEFAULT)


def read_site(path: Path) -> Site:
    """Have bash read the site's settings, as the job scripts do.

    Raises:
        ConfigError: bash cannot.
    """
    if not path.is_file():
        return Site(1, [])
    script = (
        'set -eu; SBATCH_OPTIONS=() SBATCH_OPTIONS_CPU=(); source "$1" >&2; '
        # The first one ends what bash has printed before, as by a script that BASH_ENV names.
        'printf "%s\\0" "" "${RANKS_PER_NODE:-${GPUS_PER_NODE:-1}}" "${#SBATCH_OPTIONS[@]}" "${SBATCH_OPTIONS[@]}" '
        '"${SBATCH_OPTIONS_CPU[@]}"'
    )
    done = subprocess.run(["bash", "-c", script, "site", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{path}: bash cannot read it: {done.stderr.strip()[-300:]}")
    _, ranks, count, *options = done.stdout.split("\0")[:-1]
    if not ranks.isdigit() or int(ranks) < 1:
        raise ConfigError(f"{path}: GPUS_PER_NODE or RANKS_PER_NODE '{ranks}': a number of at least 1 is needed")
    return Site(int(ranks), options[: int(count)], options[int(count) :])


def option_of(options: list[str], name: str) -> str | None:
    """The value of the last ``--name=value`` among options, None without one."""
    values = [option.partition("=")[2] for option in options if option.startswith(f"--{name}=")]
    return values[-1] if values else None
