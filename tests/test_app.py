"""app.py and what the repository ships: the Space's header, requirements, examples, and the main job on the mini."""

import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from gradio_client import Client, handle_file
from hub_server import Hub, serving
from PIL import Image

import app
from facesnap.web import server
from facesnap.web.form import examples
from facesnap.web.request import POSES, STYLES, styles

ROOT = Path(__file__).parents[1]
MINI = app.MINI


def test_a_page_that_its_host_ends_cleans_up_as_after_ctrl_c(pipe, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(app, "load", lambda *given: pipe)
    monkeypatch.setattr(server, "build", lambda *given, **options: None)
    monkeypatch.setattr(server, "launch", lambda demo: signal.raise_signal(signal.SIGTERM))
    try:
        with pytest.raises(KeyboardInterrupt):  # at which Gradio closes the server, and the files go
            app.main([])
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_mini_is_known_however_its_folder_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "link").symlink_to(MINI)
    for written in ("mini", "assets/mini", "./assets/mini/", str(MINI), str(tmp_path / "link")):
        assert app.is_mini(written)
    assert not app.is_mini("instantid") and not app.is_mini("assets")


@pytest.mark.parametrize("variable", ["", None])
def test_an_empty_variable_is_none(pipe, monkeypatch, variable):
    loaded = []
    monkeypatch.setattr(app, "load", lambda *given: loaded.append(given) or pipe)
    monkeypatch.setattr(server, "build", lambda *given, **options: None)
    monkeypatch.setattr(server, "launch", lambda demo: None)
    monkeypatch.setattr(signal, "signal", lambda *given: None)
    monkeypatch.delenv("FACESNAP_MODEL", raising=False)
    if variable is not None:
        monkeypatch.setenv("FACESNAP_MODEL", variable)
    app.main([])
    assert loaded == [(str(MINI), None)]


# What the repository ships --------------------------------------------------------------------------------


def test_a_missing_model_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("FACESNAP_MODEL", str(tmp_path / "nothing"))
    with pytest.raises(SystemExit, match="There is no model .*nothing.*\n.*FACESNAP_MODEL"):
        app.main([])


def test_spaces_is_imported_before_torch(tmp_path):
    (tmp_path / "spaces.py").write_text("import os, sys; print('torch' in sys.modules, flush=True); os._exit(0)")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", "import app"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr


def header() -> dict[str, str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    return dict(line.split(": ", 1) for line in text.splitlines() if ": " in line and not line.startswith(" "))


def test_the_spaces_header_is_complete():
    keys = header()
    wanted = "title emoji colorFrom colorTo sdk sdk_version python_version app_file short_description license"
    assert set(wanted.split()) | {"suggested_hardware", "startup_duration_timeout"} <= set(keys)
    assert len(keys["short_description"].strip('"')) <= 60 and keys["sdk"] == "gradio"
    assert (ROOT / keys["app_file"]).exists()
    pins = dict(line.split("==") for line in (ROOT / "pre-requirements.txt").read_text().split())
    assert pins["torch"] in ("2.8.0", "2.9.1", "2.10.0", "2.11.0")  # those that ZeroGPU lists
    assert keys["python_version"].strip('"') in ("3.10.13", "3.12", "3.12.12")


def test_the_documented_upload_makes_a_space(tmp_path):
    """docs/space.md's own command, in the checkout, against a Hub that refuses binaries in git."""
    command = re.search(r"```bash\n(hf upload.*?)```", (ROOT / "docs" / "space.md").read_text(encoding="utf-8"), re.S)
    hub, hf = Hub(), Path(sys.executable).parent
    with serving(hub) as address:
        environment = os.environ | {
            "HF_ENDPOINT": address, "HF_TOKEN": "hf_x", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PATH": f"{hf}:{os.environ['PATH']}",
        }  # fmt: skip
        done = subprocess.run(
            ["bash", "-euc", command[1]], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 0, done.stderr[-2000:]
    assert hub.created[0] | {"type": "space", "sdk": "gradio"} == hub.created[0]
    sent = {path for path in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()}
    wanted = {path for path in sent if path.startswith(("facesnap/", "assets/")) or path in ("app.py", "README.md")}
    assert wanted <= set(hub.files) and not [
        p for p in hub.files if p.startswith(("tests/", "docs/")) or "__pycache__" in p
    ]
    assert all(hub.files[path] == (ROOT / path).read_bytes() for path in ("app.py", "assets/mini/facesnap.json"))


def test_requirements_are_those_of_the_package_and_its_page():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert sorted(lines) == sorted(project["dependencies"] + project["optional-dependencies"]["web"])
    assert not [line for line in project["dependencies"] if line.startswith(("gradio", "spaces"))]


needs_mini = pytest.mark.skipif(not MINI.exists() and not os.environ.get("CI"), reason="assets/mini is not built yet")


@needs_mini
def test_every_example_has_its_photo():
    from facesnap.folder import read_settings

    shelf = examples(server.ASSETS / "examples")
    known = [style.name for style in styles(read_settings(MINI))]
    assert len(shelf) >= 3 and len(known) < len(STYLES)  # the mini offers the styles that it was taught
    assert all(row["pose"] in POSES and row["prompt"] and row["style"] in known for row in shelf)
    assert all(Path(row["reference"]).exists() for row in shelf)


@needs_mini
def test_the_main_job_on_the_mini():
    pipe = app.load(str(MINI))
    demo = server.build(pipe)
    _, url, _ = server.launch(demo, prevent_thread_lock=True, quiet=True)
    row = examples(server.ASSETS / "examples")[0]
    arguments = {name: row[name] for name in ("prompt", "pose", "style")}
    photo = handle_file(row["reference"])
    (path,), report = Client(url, verbose=False).predict(
        reference=photo, **arguments, consent=True, seed=1, api_name="/generate"
    )
    demo.close()
    portrait = Image.open(path)
    assert portrait.size == (pipe.settings.size, pipe.settings.size)
    assert portrait.text["seed"] == "1" and "trainedAlgorithmicMedia" in str(portrait.info)
    assert report["identity_score"] is not None
