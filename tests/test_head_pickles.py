"""Files of FLAME and DECA that are pickles: nothing of them runs, and what is wrong with them is said."""

import head_files as files
import numpy as np
import pytest

from facesnap.errors import InputError
from facesnap.heads import deca as deca_module
from facesnap.heads import flame as flame_module
from facesnap.heads.__main__ import main as command


def forbidden(tmp_path, payload, victim):
    """The four places where a pickle comes in, each with a payload → what reads it."""
    embedding, tar, model = tmp_path / "embedding.npy", tmp_path / "deca_model.tar", tmp_path / "generic_model.pkl"
    if victim == "model":
        files.write_flame(model, bs_hidden=payload)
        return lambda: flame_module.read(model, files.write_embedding(embedding))
    if victim == "embedding":
        files.write_embedding(embedding, extra=payload)
        return lambda: flame_module.read(files.write_flame(model), embedding)
    files.write_deca(tar, files.tiny_encoder(), extra=payload)
    return lambda: deca_module.read_encoder(tar)


@pytest.mark.parametrize(
    "victim, kind",
    [
        ("model", files.Payload),
        ("embedding", files.Payload),
        ("embedding", files.StorageWithPayload),  # a pickle in a pickle
        ("tar", files.Payload),
        ("tar", files.StorageWithPayload),
    ],
)
def test_what_a_pickle_must_not_name_is_refused_by_name_and_not_run(tmp_path, victim, kind):
    made = tmp_path / "made"
    read = forbidden(tmp_path, kind(made), victim)
    name = r"(io|_io|builtins|__builtin__)\.open|torch\.storage\._load_from_bytes"
    with pytest.raises(InputError, match=f"was refused: it names ({name}), which is none"):
        read()
    assert not made.exists()


def test_the_payload_would_have_run(tmp_path):
    """Else the test above proves nothing."""
    import pickle

    for kind in (files.Payload, files.StorageWithPayload):
        made = tmp_path / kind.__name__
        stored = pickle.dumps(kind(made))
        assert not made.exists()
        pickle.loads(stored)
        assert made.exists()


def test_convert_refuses_a_forbidden_pickle_and_writes_nothing(tmp_path):
    model = files.write_flame(tmp_path / "generic_model.pkl", bs_hidden=files.Payload(tmp_path / "made"))
    embedding = files.write_embedding(tmp_path / "embedding.npy")
    words = ["convert", "flame", "--model", model, "--embedding", embedding, "--out", tmp_path / "head"]
    with pytest.raises(SystemExit, match=r"generic_model.pkl was refused: it names \w+\.open"):
        command(list(map(str, words)))
    assert not (tmp_path / "made").exists() and not (tmp_path / "head").exists()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"posedirs": None}, "generic_model.pkl has no posedirs"),
        ({"shapedirs": np.zeros((files.VERTICES, 3, 310))}, "has 310 shape directions"),
        ({"weights": np.zeros((files.VERTICES, 4))}, "weights is 209 × 4, expected n × 5"),
        ({"posedirs": np.zeros((9, 3, 36))}, "posedirs is of 9 vertices, the template of 209"),
        ({"f": np.full((68, 3), 500, np.uint32)}, "f is of 501 vertices"),
        ({"f": np.zeros((20, 3), np.uint32)}, "do not belong together"),
        ({"v_template": -files.flame_entries()["v_template"]}, "not iBUG's of an upright head"),
        ({"v_template": {"x": 1}}, "holds v_template as objects"),
    ],
)
def test_flame_of_another_form_is_refused(tmp_path, changes, said):
    model = files.write_flame(tmp_path / "generic_model.pkl", **changes)
    with pytest.raises(InputError, match=said):
        flame_module.read(model, files.write_embedding(tmp_path / "embedding.npy"))


def test_damaged_files_are_refused(tmp_path):
    model, embedding = files.write_flame(tmp_path / "generic_model.pkl"), files.write_embedding(tmp_path / "marks.npy")
    whole = model.read_bytes()
    model.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="generic_model.pkl cannot be read"):
        flame_module.read(model, embedding)
    model.write_bytes(whole)
    embedding.write_bytes(b"no array")
    with pytest.raises(InputError, match="marks.npy cannot be read"):
        flame_module.read(model, embedding)
    np.save(embedding, np.zeros(3))
    with pytest.raises(InputError, match="marks.npy holds a ndarray where a dictionary"):
        flame_module.read(model, embedding)
    tar = tmp_path / "deca_model.tar"
    tar.write_bytes(b"no tensors")
    with pytest.raises(InputError, match="deca_model.tar cannot be read"):
        deca_module.read_encoder(tar)


def test_unknown_objects_of_chumpy_are_named(tmp_path):
    strange = files.Ch(np.zeros(3))
    del strange.x
    model = files.write_flame(tmp_path / "generic_model.pkl", posedirs=strange)
    with pytest.raises(InputError, match="holds posedirs as a chumpy.ch.Ch"):
        flame_module.read(model, files.write_embedding(tmp_path / "embedding.npy"))
