"""Install what a benchmark needs beyond scripts/setup; it skips what cannot be installed."""

import importlib
import importlib.util
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence

from scripts.lib.checkout import CHECKOUT

INSTALLED = "install ok installed"
Say = Callable[[str], None]


def install_debian_packages(names: Sequence[str], say: Say) -> None:
    """Install those that are missing, one by one: a package that does not exist here stops no other."""
    missing = [name for name in names if not _is_installed(name)]
    if not missing:
        return
    say(f"installing {' '.join(missing)}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-q"], check=False, stdout=subprocess.DEVNULL)
    for name in missing:
        command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", name]
        if subprocess.run(command, check=False, stdout=subprocess.DEVNULL, env=environment).returncode:
            say(f"could not install {name}: what needs it is skipped")


def install_extra(extra: str, module: str, say: Say) -> None:
    """Install an optional group of pyproject.toml into this environment, if its module is missing."""
    if importlib.util.find_spec(module) is not None:
        return
    say(f"installing {module} into {sys.prefix}")
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    if subprocess.run([*pip, *project["optional-dependencies"][extra]], check=False).returncode:
        say(f"could not install {module}: what needs it is skipped")
    importlib.invalidate_caches()


def _is_installed(name: str) -> bool:
    query = ["dpkg-query", "-W", "-f", "${Status}", name]
    return INSTALLED in subprocess.run(query, check=False, capture_output=True, text=True).stdout
