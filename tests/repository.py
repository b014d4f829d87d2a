"""The files of this repository, for tests of the repository itself."""

import shutil
import subprocess
from pathlib import Path
from typing import List

ROOT = Path(__file__).resolve().parents[1]


def repository_files() -> List[Path]:
    """Return the files of the repository (tracked, or new and not ignored), relative to ``ROOT``."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout.decode().split("\0")
    return [Path(name) for name in names if name and (ROOT / name).is_file()]


def copy_repository(destination: Path) -> Path:
    """Copy the repository's files, with their times, so that a test can build there and leave the clone unchanged."""
    for name in repository_files():
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, destination / name)
    return destination
