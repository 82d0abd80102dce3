"""Run by `wheel` where the package is installed, in a folder that holds a photo, me.png, and a checkpoint, model/: the
package imports, prepares photographs and serves that checkpoint."""

import importlib
import pkgutil
import shutil
import sys
from pathlib import Path

import facesnap

assert Path(facesnap.__file__).is_relative_to(sys.prefix), f"{facesnap.__file__} is not what was installed"
for module in pkgutil.walk_packages(facesnap.__path__, "facesnap."):
    if module.name.rpartition(".")[2] != "__main__":
        importlib.import_module(module.name)

from facesnap.training.prepare import __main__ as prepare  # noqa: E402

Path("photos/somebody").mkdir(parents=True)
shutil.copy("me.png", "photos/somebody/1.png")
words = ["photos", "shards", "--resolution", "256"]
try:
    prepare.main(words)
except SystemExit as error:
    assert "give --pack and --head" in str(error), error
else:
    raise AssertionError("there is no mini here, so its face pack cannot have been found")
prepare.main([*words, "--pack", "model/face_pack", "--head", "model/head"])
assert len(list(Path("shards").glob("*.tar"))) == 1

from gradio_client import Client, handle_file  # noqa: E402
from PIL import Image  # noqa: E402

from facesnap import checkpoints  # noqa: E402
from facesnap.web import server  # noqa: E402

demo = server.build(checkpoints.load("model"))
_, url, _ = server.launch(demo, prevent_thread_lock=True, quiet=True)
(path,), report = Client(url, verbose=False).predict(
    reference=handle_file("me.png"), pose="quarter-left", consent=True, steps=2, api_name="/generate"
)
assert Image.open(path).size == (report["width"], report["height"]) and report["likeness"]
demo.close()
print("The wheel imports, prepares and serves.")
