"""Make .types/depthc/, the package as one folder of links.

The package maps depthc.ir to ir/ and so on at installation, which a type checker or a documentation
generator does not see. They read this folder instead.
"""

import os
import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINKS = ROOT / ".types" / "depthc"


def packages() -> dict[str, Path]:
    """Folder of the package and of each of its rooms named in pyproject.toml: {"depthc.ir": ROOT/"ir", ...}."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        mapping = tomllib.load(file)["tool"]["setuptools"]["package-dir"]
    return {name: ROOT / folder for name, folder in mapping.items() if name.count(".") < 2}


def link_package() -> dict[Path, Path]:
    """Make the links afresh and return {link: target}."""
    shutil.rmtree(LINKS, ignore_errors=True)
    LINKS.mkdir(parents=True)
    front, *rooms = packages().items()
    links = {LINKS / entry.name: entry for entry in front[1].iterdir() if entry.name != "__pycache__"}
    links |= {LINKS / name.removeprefix("depthc."): folder for name, folder in rooms if folder.exists()}
    for link, target in links.items():
        link.symlink_to(os.path.relpath(target, LINKS))
    return links


if __name__ == "__main__":
    link_package()
