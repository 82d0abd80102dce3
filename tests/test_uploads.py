"""What visitors upload: nothing of it but the face gets into a portrait, and its files are deleted in time."""

from pathlib import Path

import httpx
from calls import order
from gradio_client import Client, handle_file
from PIL import Image
from served import wait_for

from facesnap.web import server, uploads
from facesnap.web.line import Allowance, Busy


def test_nothing_of_the_photos_metadata_goes_into_the_portrait(client, page, files, tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "SECRETPLACE"
    exif.get_ifd(0x8825)[1] = "N"
    photo = Image.open(files.ann)
    photo.save(tmp_path / "gps.png", exif=exif)
    for path in (
        client.predict(reference=handle_file(str(tmp_path / "gps.png")), api_name="/preview")[0],
        client.predict(**order(files, reference=str(tmp_path / "gps.png")))[0][0],
    ):
        assert b"SECRETPLACE" not in Path(path).read_bytes() and not Image.open(path).getexif()
        assert b"gps" not in Path(path).read_bytes()


def test_who_sends_too_much_is_refused_in_words(page, files, monkeypatch):
    def take(self, address, size):
        if address == "8.8.4.4":
            raise Busy("Your address has sent too much.")

    monkeypatch.setattr(Allowance, "take", take)
    said = {}
    for address in ("8.8.4.4", "9.9.9.9"):
        photo, headers = {"files": ("me.png", Path(files.ann).read_bytes())}, {"X-Forwarded-For": address}
        said[address] = httpx.post(f"{page.url}gradio_api/upload", files=photo, headers=headers)
    assert (said["8.8.4.4"].status_code, said["8.8.4.4"].text) == (400, "Your address has sent too much.")
    assert said["9.9.9.9"].status_code == 200


def test_visitors_files_go_with_the_page(pipe, files):
    demo = server.build(pipe)
    _, url, _ = server.launch(demo, prevent_thread_lock=True, quiet=True)
    try:
        sent = httpx.post(f"{url}gradio_api/upload", files={"files": ("me.png", Path(files.ann).read_bytes() + b"!")})
        (portrait,), _ = Client(url, verbose=False, download_files=False).predict(**order(files))
        kept = [Path(sent.json()[0]), Path(portrait["path"])]
        assert all(path.exists() and path.is_relative_to(uploads.folder()) for path in kept)
    finally:
        demo.close()
    wait_for(lambda: not any(path.exists() for path in kept))


def test_a_sweep_deletes_what_is_old_and_survives_what_it_cannot(tmp_path, monkeypatch):
    old, stuck, own = (tmp_path / name / "photo" for name in ("old", "stuck", "own"))
    for path in (old, stuck, own):
        path.parent.mkdir()
        path.write_bytes(b"x")
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda self: (_ for _ in ()).throw(OSError) if self == stuck else unlink(self))
    uploads.sweep(tmp_path, 3600, frozenset({own}))
    assert old.exists()  # it is young
    uploads.sweep(tmp_path, -1, frozenset({own}))
    assert not old.parent.exists() and stuck.exists() and own.exists()
    assert uploads.EVERY + uploads.OLDEST < 3600


def test_what_a_killed_server_left_is_deleted_at_the_next_start(monkeypatch, tmp_path):
    monkeypatch.setattr(uploads.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    ours = uploads.folder().parent
    assert ours.stat().st_mode & 0o077 == 0  # nobody else's
    dead, reused = ours.parent / "999999999-1", ours.parent / f"{ours.name.partition('-')[0]}-1"
    for left in (dead, reused):
        (left / "hash").mkdir(parents=True)
        (left / "hash" / "face.png").write_bytes(b"x")
    (ours / "mine").mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # as at a start
    assert uploads.folder().parent == ours and (ours / "mine").exists() and not dead.exists() and not reused.exists()
