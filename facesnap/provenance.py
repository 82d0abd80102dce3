"""Where a result comes from: the commit of the code, the weights by their fingerprint, machine and libraries."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from facesnap.errors import InputError

LIBRARIES = (
    "torch",
    "diffusers",
    "transformers",
    "insightface",
    "onnxruntime",
    "numpy",
    "opencv-python",
    "numba",
)
LARGE = 64 * 2**20  # bytes; a file above this is read in so many places only
SAMPLES, SAMPLE = 64, 2**20


def commit() -> str:
    """The commit of the code that runs, with "+changes" where files differ from it; "unknown" where this package is
    no part of a repository, even if one happens to enclose the place it is installed in."""

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):  # no git, no repository, or another's
        return "unknown"


def fingerprint(folder: Path) -> str:
    """Twelve digits that change with any weight or setting: a hash over the names and contents of all files. Of files
    above 64 MB it reads the size and 64 places spread over them, which no training leaves as they were."""
    digest = hashlib.sha256()
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    if not files:
        raise InputError(f"There is no model in '{folder}'; give the folder of a checkpoint, such as assets/mini.")
    for path in files:
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        size = path.stat().st_size
        if size <= LARGE:
            digest.update(path.read_bytes())
            continue
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for k in range(SAMPLES):
                file.seek(k * (size - SAMPLE) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:12]


def machine() -> dict:
    """Processor, cores this process may use, memory (GB)."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, object] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": name,
        "cores": cores,
    }
    if hasattr(os, "sysconf"):
        found["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    return found


def libraries() -> dict[str, str]:
    """The versions of Python and of the libraries that figures depend on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found
