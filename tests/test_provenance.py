"""Where results come from: whose commit, and weights told apart without reading all of them."""

import shutil
import subprocess
import sys
from pathlib import Path

import facesnap
from facesnap import provenance


def test_a_repository_that_only_encloses_the_package_is_not_its_own(tmp_path):
    """As when it is installed into a virtual environment inside somebody's project."""
    package = tmp_path / "project" / ".venv" / "facesnap"
    shutil.copytree(Path(facesnap.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "*.npz"))
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(tmp_path / "project")]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    command = "from facesnap import provenance; print(provenance.commit())"

    def said():
        run = [sys.executable, "-c", command]
        return subprocess.run(run, cwd=package.parent, check=True, capture_output=True, text=True).stdout.strip()

    assert said() == "unknown"
    subprocess.run([*git, "add", "-f", str(package)], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "ours"], check=True)
    assert len(said()) == 40


def test_large_files_are_told_apart_by_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "LARGE", 10_000)
    monkeypatch.setattr(provenance, "SAMPLE", 16)
    (tmp_path / "weights").write_bytes(bytes(20_000))
    before = provenance.fingerprint(tmp_path)
    assert before == provenance.fingerprint(tmp_path)
    for where in (0, 19_999):
        changed = bytearray(20_000)
        changed[where] = 1
        (tmp_path / "weights").write_bytes(changed)
        assert provenance.fingerprint(tmp_path) != before
    (tmp_path / "weights").write_bytes(bytes(20_001))
    assert provenance.fingerprint(tmp_path) != before
