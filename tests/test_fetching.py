"""What is shown of the files that a checkpoint needs, and how they are fetched; over a made-up Hub (tiny_hub.py)."""

import errno
import re
import shutil
from dataclasses import replace

import pytest
from fake_hub import put
from huggingface_hub import constants

from facesnap import checkpoints
from facesnap.checkpoints import plans, sources
from facesnap.checkpoints.__main__ import main
from facesnap.errors import InputError

pytestmark = pytest.mark.usefixtures("hub")


# show ---------------------------------------------------------------------------------------------------


def test_show_lists_every_file_with_size_licence_and_pin(hub, made, online):
    shown = re.sub(" +", " ", checkpoints.show(checkpoints.plan("instantid")))
    for line in (
        "base model: Lykon/dreamshaper-xl-v2-turbo @ main, NOT PINNED",
        "InstantID: InstantX/InstantID @ 57b32dfee076092ad2930c71fd6d439c2c3b1820",
        "fetch 5.14 GB unet/diffusion_pytorch_model.fp16.safetensors",
        "fetch 1.69 GB ip-adapter.bin",
        "fetch 260.7 MB glintr100.onnx",
        "fetch 0.9 kB gnm/shape/data/landmarks/head_sparse_68.txt",
        "licence: non-commercial research only ** NO COMMERCIAL USE **",
        "head model: google/gnm-v3 @",
        "7.27 GB from elsewhere, 7.27 GB of it still to be fetched",
    ):
        assert line in shown
    assert "face encoder" not in shown  # InstantID has none
    folder = put(hub, "InstantX/InstantID", sources.INSTANTID.revision, made / "instantid")
    shown = re.sub(" +", " ", checkpoints.show(checkpoints.plan("instantid")))
    size = (folder / "ip-adapter.bin").stat().st_size
    assert f"cached {plans.shown_size(size)} ip-adapter.bin" in shown  # what lies here is as large as it is
    assert "fetch 5.14 GB" in shown


def test_sizes_that_nobody_can_say_are_not_made_up(hub):
    """Offline: only what InsightFace's pack weighs is known, since its files are told apart by that."""
    shown = re.sub(" +", " ", checkpoints.show(checkpoints.plan("instantid")))
    assert "fetch size unknown ip-adapter.bin" in shown and "fetch 260.7 MB glintr100.onnx" in shown
    assert "23 files of unknown size and 421.2 MB from elsewhere" in shown


def test_show_from_the_command_line(capsys):
    main(["show", "mini"])
    assert "nothing to fetch" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="did you mean 'instantid'"):
        main(["show", "instantdi"])


# fetching -----------------------------------------------------------------------------------------------


def test_offline_one_error_names_the_files_and_where_they_belong(hub):
    with pytest.raises(InputError) as caught:
        checkpoints.load("instantid", device="cpu", yes=True)
    said = str(caught.value)
    for words in (
        "HF_HUB_OFFLINE is set",
        "InstantID, 3 files of InstantX/InstantID: on a machine",
        f"hf download InstantX/InstantID --revision {sources.INSTANTID.revision} ControlNetModel/config.json",
        "ip-adapter.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "models--InstantX--InstantID",
        str(hub),
        "antelopev2.zip",
        "head_sparse_68.txt",
    ):
        assert words in said


def test_network_errors_are_the_same_error(monkeypatch, online):
    monkeypatch.setattr(
        "facesnap.checkpoints.sources.snapshot_download", lambda *a, **k: (_ for _ in ()).throw(OSError("no"))
    )
    with pytest.raises(InputError, match=r"(?s)could not be fetched \(OSError\).*Lykon"):
        checkpoints.fetch(checkpoints.plan("instantid"), yes=True)


def test_a_disk_that_fills_while_fetching(monkeypatch, online):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("facesnap.checkpoints.sources.snapshot_download", full)
    with pytest.raises(InputError, match=r"The disk is full; 'instantid' needs 7\.27 GB"):
        checkpoints.fetch(checkpoints.plan("instantid"), yes=True)


def test_large_files_are_not_fetched_unasked(monkeypatch, online):
    with pytest.raises(InputError, match=r"needs 7\.27 GB from .*fetch instantid --yes"):
        checkpoints.load("instantid", device="cpu")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    with pytest.raises(InputError, match="Nothing was fetched"):
        checkpoints.load("instantid", device="cpu")
    monkeypatch.setattr(sources.Source, "sized", lambda self: self)
    with pytest.raises(InputError, match="Nothing was fetched"):  # nor those of which nobody knows how large they are
        checkpoints.fetch(checkpoints.plan("instantid"))


def test_no_room_on_the_disk(monkeypatch, online):
    monkeypatch.setattr("shutil.disk_usage", lambda place: shutil._ntuple_diskusage(10**10, 10**9, 10**9))
    with pytest.raises(InputError, match=r"no room: 7\.27 GB are to be fetched and 1.00 GB are free"):
        checkpoints.load("instantid", device="cpu", yes=True)


def test_small_files_are_fetched_unasked_and_checked(hub, made, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked = []

    def download(repo, *, revision, allow_patterns):
        asked.append((repo, revision, tuple(allow_patterns)))
        put(hub, repo, revision, made / "clip")

    monkeypatch.setattr("facesnap.checkpoints.sources.snapshot_download", download)
    small = replace(sources.CLIP, files=tuple(replace(file, size=1000) for file in sources.CLIP.files))
    wanted = plans.Plan("x", "facesnap", {}, {"face_encoder": small})
    checkpoints.fetch(wanted)
    assert asked == [(small.repo, small.revision, ("config.json", "model.safetensors"))]
    assert wanted.place("face_encoder").name == small.revision
    lost = replace(small, files=(*small.files, sources.File("tokens.json", 1)))
    with pytest.raises(InputError, match="it did not arrive"):
        checkpoints.fetch(plans.Plan("x", "facesnap", {}, {"face_encoder": lost}))


def test_face_pack_is_unpacked_by_insightface_and_checked(pack, monkeypatch):
    """Nested, as its archive is, and compared by content: a file of the right size may be another."""
    kept = pack.rename(pack.with_name("kept"))

    def unpack(kind, name, force):
        assert (kind, name, force) == ("models", "antelopev2", True)
        shutil.copytree(kept, pack)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "insightface_download", unpack)
    source = sources.FACE_PACK
    assert source.cached(source.files[0]) is None
    with pytest.raises(InputError, match="scrfd_10g_bnkps.onnx of antelopev2 did not arrive whole"):
        checkpoints.fetch(plans.Plan("x", "facesnap", {}, {"face_pack": source}), yes=True)
    true = {file.path: sources.digest(source.cached(file)) for file in source.files}
    right = replace(source, files=tuple(replace(file, sha256=true[file.path]) for file in source.files))
    shutil.rmtree(pack)
    checkpoints.fetch(plans.Plan("x", "facesnap", {}, {"face_pack": right}), yes=True)
    assert right.cached(right.files[0]).parent == pack / "antelopev2"


def test_head_landmarks_come_from_github_at_a_commit_and_are_checked(tmp_path, monkeypatch):
    source = sources.HEAD_LANDMARKS
    served = tmp_path / "web" / source.repo / source.revision / source.files[0].path
    served.parent.mkdir(parents=True)
    served.write_text("0 1 1 0 2 0\n" * 68)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "GITHUB", (tmp_path / "web").as_uri())
    wanted = plans.Plan("x", "facesnap", {}, {"head_landmarks": source})
    with pytest.raises(InputError, match="could not be fetched .RuntimeError"):  # the hash is another
        checkpoints.fetch(wanted)
    assert source.cached(source.files[0]) is None
    right = replace(source, files=(replace(source.files[0], sha256=sources.digest(served)),))
    checkpoints.fetch(plans.Plan("x", "facesnap", {}, {"head_landmarks": right}))
    assert right.cached(right.files[0]).read_text() == served.read_text()
