"""The visitors' files: where they lie, which of them may be used, and when they go.

Gradio keeps uploads and results in one folder, each in a directory named by the hash of its content. Here that folder
belongs to this process alone. A request may only name a regular file in it, so that nothing else on the machine is
read, and nothing but files gets on the list of what is to be deleted.
"""

import asyncio
import base64
import binascii
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import psutil

from facesnap.errors import InputError, shown

log = logging.getLogger(__name__)

MOST_BYTES = 20 * 2**20  # of one upload
EVERY, OLDEST = 300, 3000  # seconds: files go within the hour
NO_URLS = "Addresses are not fetched here: upload the picture itself."
GONE = "The photo is no longer here, uploads are deleted within the hour: add it again."
FORMS = (
    "upload the file to /gradio_api/upload and give the path that it answers, or give the picture as a data: URL, "
    "or use handle_file of Gradio's client"
)


# ---------------------------------------------------------------------- where they lie


def folder() -> Path:
    """The uploads of this process, in a folder that nobody else can read. Gradio is told of it by its variable, which
    it asks for whenever it makes a component or checks a path."""
    ours = _shelf() / _name(os.getpid()) / "uploads"
    if os.environ.get("GRADIO_TEMP_DIR") != str(ours) or not ours.is_dir():
        for left in _left_behind(_shelf()):
            shutil.rmtree(left, ignore_errors=True)
        for place in (_shelf(), ours.parent, ours, scratch(ours)):
            place.mkdir(mode=0o700, exist_ok=True)
        os.environ["GRADIO_TEMP_DIR"] = str(ours)
    return ours


def scratch(uploads: Path) -> Path:
    """Beside it, for portraits until Gradio has copied them: what it keeps is named by content."""
    return uploads.parent / "making"


def _shelf() -> Path:
    return Path(tempfile.gettempdir()).resolve() / f"facesnap-{os.getuid() if hasattr(os, 'getuid') else 'uploads'}"


def _name(process: int) -> str:
    """With its start, since numbers of processes are used again, in containers always the same."""
    return f"{process}-{int(psutil.Process(process).create_time())}"


def _left_behind(shelf: Path) -> list[Path]:
    """Folders of processes that are gone: killed ones cannot clean up."""

    def lives(place: Path) -> bool:
        try:
            return place.name == _name(int(place.name.partition("-")[0]))
        except (ValueError, OverflowError, psutil.Error):
            return False

    return [place for place in shelf.glob("*") if not lives(place)]


# ---------------------------------------------------------------------- which may be used


def own(path: Any) -> str:
    """The path of an upload, if that is what it is; InputError otherwise. One that was deleted passes, and is said to
    be gone where it is opened."""
    if not isinstance(path, str):
        raise InputError(f"A photo cannot be {shown(path)!r}: {FORMS}.")
    if path.startswith(("http:", "https:", "ftp:", "//")):
        raise InputError(NO_URLS)
    root = folder()
    try:
        place = Path(os.path.abspath(root / path))
        inside = os.path.isabs(path) and place.parent.parent == root and place.parent.resolve() == place.parent
        kind = place.lstat().st_mode if inside and place.exists() else stat.S_IFREG
    except (OSError, ValueError):  # a name that no file can have
        inside, kind = False, 0
    if not inside or not stat.S_ISREG(kind):
        raise InputError(f"A photo is given that was not uploaded here: {FORMS}.")
    return str(place)


def photo(value: Any) -> str | None:
    """The path of a photo in any form that a program may send: an upload's path, Gradio's record of it, a data: URL."""
    if isinstance(value, dict):
        value = value.get("path") or value.get("url")
    if isinstance(value, str) and value.startswith("data:"):
        return keep(_from_data_url(value))
    return None if value is None else own(value)


def keep(data: bytes) -> str:
    """The bytes as an upload of their own. → its path"""
    place = folder() / hashlib.sha256(data).hexdigest()
    place.mkdir(mode=0o700, exist_ok=True)
    path = place / "photo"
    path.write_bytes(data)
    return str(path)


def _from_data_url(url: str) -> bytes:
    head, _, body = url.partition(",")
    if len(body) > MOST_BYTES * 4 / 3 + 4:
        raise InputError(f"The photo in the data: URL is larger than {MOST_BYTES // 2**20} MB: make it smaller.")
    try:
        if not head.endswith(";base64"):
            raise ValueError
        return base64.b64decode(body, validate=True)
    except (ValueError, binascii.Error):
        raise InputError("The data: URL cannot be read: it must be data:image/…;base64,… with the file.") from None


def admit(value: Any) -> None:
    """InputError for whatever names a file that is no upload, anywhere in what an event was sent."""
    if isinstance(value, dict):
        if "path" in value and value["path"] is not None:
            own(value["path"])
        if value.get("is_stream"):
            raise InputError(f"A photo cannot be a stream: {FORMS}.")
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            admit(item)


# ---------------------------------------------------------------------- when they go


def sweep(place: Path, seconds: float, kept: frozenset[Path]) -> None:
    """Deletes what has lain there for so long. Whatever cannot be deleted does not keep the rest."""
    now = time.time()
    for path in sorted(place.rglob("*"), reverse=True):  # files before their folders
        try:
            state = path.lstat()
            if path in kept or now - max(state.st_mtime, state.st_ctime) < seconds:
                continue
            if stat.S_ISDIR(state.st_mode):
                if not any(path.iterdir()):
                    path.rmdir()
            else:
                path.unlink()
        except OSError as error:
            if path.exists():
                log.warning("a visitor's file cannot be deleted (%s)", type(error).__name__)


page_files: set[Path] = set()  # pictures of the pages themselves, examples and the like


def keeping_clean() -> Callable[[Any], AbstractAsyncContextManager[None]]:
    """A lifespan of the server: sweeps while it runs and when it ends. What lies in the folder now, when the page is
    built and nobody has come, is the page's own."""
    place = folder()
    page_files.update(path for path in place.rglob("*") if path.is_file())

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        async def regularly() -> None:
            while True:
                await asyncio.sleep(EVERY)
                await asyncio.to_thread(sweep, place, OLDEST, frozenset(page_files))

        task = asyncio.create_task(regularly())
        try:
            yield
        finally:
            task.cancel()
            sweep(place, 0, frozenset(page_files))

    return lifespan


# ---------------------------------------------------------------------- inputs of the page
# Classes and no patched components: Gradio makes a component anew for each session that it updates. Each hands over
# paths and opens nothing: `facesnap.images.open_image` reads the header first and says what is wrong.


class Photo(gr.Image):
    """An input for one picture."""

    is_template = True  # looks like its parent

    def preprocess(self, payload: Any) -> Any:
        return payload.path if payload else None


class Photos(gr.Gallery):
    """An input for several pictures: a list of paths."""

    is_template = True

    def preprocess(self, payload: Any) -> Any:
        if payload is None:
            return None
        return [(getattr(item, "image", None) or item.video).path for item in payload.root]


class MorePhotos(gr.UploadButton):
    """The same as a button."""

    is_template = True

    def preprocess(self, payload: Any) -> Any:
        items = payload.root if hasattr(payload, "root") else payload or []
        return [item.path for item in (items if isinstance(items, list) else [items])]
