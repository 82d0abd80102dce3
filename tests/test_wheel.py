"""What `pip install .` installs; that it works outside the checkout is `.ci/wheel`'s to show."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = (".json", ".npz", ".html", ".css", ".js", ".yaml", ".png", ".typed")


def test_the_wheel_holds_every_module_and_all_data_of_the_package(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "facesnap", source / "facesnap", ignore=shutil.ignore_patterns("__pycache__"))
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("facesnap-*.whl"))) as wheel:
        held = {name for name in wheel.namelist() if name.startswith("facesnap/")}
    there = {path.relative_to(source).as_posix() for path in (source / "facesnap").rglob("*")}
    assert {name for name in there if name.endswith((".py", *DATA))} <= held
    assert {"facesnap/web/page.css", "facesnap/web/templates/front.png", "facesnap/evaluation/study.html"} <= held
