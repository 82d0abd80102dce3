"""plan, make, score: what is asked, who fills it, and that nothing wrong or missing is passed over in silence."""

import importlib
import json
import runpy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TOKEN_DIM, photo, tiny_pipeline, tiny_unet

from facesnap.errors import InputError
from facesnap.evaluation import html, looks, methods, plan, protocol, score
from facesnap.evaluation.__main__ import parse
from facesnap.heads import from_pretrained as read_head
from facesnap.templates import TEMPLATES

SIZE = 64


def planned(out, *options: str) -> plan.Plan:
    return plan.run(parse(["plan", "--out", str(out), "--size", str(SIZE), *options]))


@pytest.fixture(scope="module")
def rendered_plan(tmp_path_factory):
    return planned(tmp_path_factory.mktemp("planned") / "plan", "--people", "2", "--poses", "2")


@pytest.fixture
def filled(rendered_plan, tmp_path):
    """A method's folder with the true pictures in it."""
    folder = tmp_path / "ours"
    folder.mkdir()
    for row in rendered_plan.rows:
        Image.open(rendered_plan.folder / row.truth).save(folder / row.file)
    return folder


# ------------------------------------------------------------------------------------------------ the plan


def test_a_plan_names_everything_and_a_short_one_is_the_first_of_a_long_one(rendered_plan, tmp_path):
    rows = rendered_plan.rows
    assert [row.file for row in rows] == [f"{n:05d}.png" for n in range(4)]
    assert len({row.seed for row in rows}) == 4 and len({row.reference for row in rows}) == 2
    assert all(len(row.exact) == 72 and row.wanted and row.truth for row in rows)
    header, first, *_ = (rendered_plan.folder / plan.MANIFEST).read_text().splitlines()
    assert header == "file,reference,driver,prompt,seed,size" and first.startswith("00000.png,references/")
    short = planned(tmp_path / "short", "--people", "1", "--poses", "2")
    assert [row.prompt for row in short.rows] == [row.prompt for row in rows[:2]]
    assert [row.seed for row in short.rows] == [row.seed for row in rows[:2]]


def test_a_template_is_rendered_in_its_pose_size_and_place():
    model = read_head("assets/mini/head")
    for template in (TEMPLATES[0], TEMPLATES[5], TEMPLATES[9]):
        points = protocol.exact_landmarks(plan.template_picture(template, 1_000_050, 256), 256)
        angles = model.fit(points, (256, 256))[0].angles
        assert np.abs(np.subtract(angles, (template.yaw, template.pitch, template.roll))).max() < 6
        assert np.allclose((points.min(0) + points.max(0)) / 512, (0.5, 0.58), atol=0.01)
    frontal = protocol.exact_landmarks(plan.template_picture(TEMPLATES[0], 1_000_050, 256), 256)
    assert np.ptp(frontal[:, 1]) / 256 == pytest.approx(TEMPLATES[0].head_size, rel=0.1)


def test_a_plan_changed_after_the_fact_is_refused(rendered_plan, tmp_path):
    import shutil

    for name in (plan.MANIFEST, plan.FACTS, rendered_plan.rows[0].truth):
        other = tmp_path / name.replace("/", "_")
        shutil.copytree(rendered_plan.folder, other)
        (other / name).write_bytes((other / name).read_bytes() + b" ")
        with pytest.raises(InputError, match=f"changed after it was made .1 files, such as '{name}'"):
            plan.read(other)
        (other / name).unlink()
        with pytest.raises(InputError, match=f"lacks 1 of its files, such as '{name}'"):
            plan.read(other)
    with pytest.raises(InputError, match="There is no plan"):
        plan.read(tmp_path)


def test_a_folder_keeps_its_plan(rendered_plan):
    same = ("--people", "2", "--poses", "2")
    assert planned(rendered_plan.folder, *same).digest == rendered_plan.digest
    with pytest.raises(InputError, match="holds another plan"):
        planned(rendered_plan.folder, *same, "--seed", "1")


def test_photographs_are_planned_with_their_own_truth_where_there_is_one(tmp_path):
    for name in ("ann/1.png", "ann/2.png", "bob/1.jpg"):
        path = tmp_path / "people" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(3)).save(path)
    (tmp_path / "prompts.txt").write_text("in the rain\n\n  by the sea \n")
    asked = ("--identities", str(tmp_path / "people"), "--poses", "1", "--prompts", str(tmp_path / "prompts.txt"))
    ann, bob = planned(tmp_path / "plan", *asked).rows
    assert (ann.person, bob.person) == ("ann", "bob") and ann.truth and bob.truth is None
    assert {ann.prompt, bob.prompt} <= {"in the rain", "by the sea"} and ann.exact is None
    with pytest.raises(InputError, match="number of people is 3"):
        planned(tmp_path / "more", *asked, "--people", "3")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "no folder 'people'"),
        (lambda folder: folder.mkdir(), "holds no pictures"),
        (lambda folder: (folder / "ann").mkdir(parents=True), "no pictures of 'ann'"),
        (lambda folder: [folder.mkdir(), (folder / "a.png").write_bytes(b"no")], "'a.png' cannot be used"),
        (
            lambda folder: [(folder / "ann").mkdir(parents=True), (folder / "b.heic").touch()],
            "beside them, .*b.heic",
        ),
        (lambda folder: [folder.mkdir(), *((folder / f"a.{e}").touch() for e in ("png", "jpg"))], "are called 'a'"),
    ],
)
def test_identities_that_cannot_be_are_named(tmp_path, make, words):
    make(tmp_path / "people")
    with pytest.raises(InputError, match=words):
        planned(tmp_path / "plan", "--identities", str(tmp_path / "people"), "--poses", "1")


def test_other_photographs_or_prompts_are_another_plan_and_a_killed_one_keeps_its_settings(tmp_path):
    people, prompts = tmp_path / "people", tmp_path / "prompts.txt"
    people.mkdir()
    Image.fromarray(photo(3)).save(people / "ann.png")
    prompts.write_text("in the rain\n")
    asked = ("--identities", str(people), "--poses", "1", "--prompts", str(prompts))
    first = planned(tmp_path / "plan", *asked)
    assert planned(tmp_path / "plan", *asked).digest == first.digest
    prompts.write_text("by the sea\n")
    with pytest.raises(InputError, match="holds another plan"):
        planned(tmp_path / "plan", *asked)
    (tmp_path / "plan" / plan.PLAN).rename(tmp_path / "plan" / plan.BEGUN)  # as a kill would have left it
    with pytest.raises(InputError, match="holds another plan"):
        planned(tmp_path / "plan", *asked)
    prompts.write_text("in the rain\n")
    assert planned(tmp_path / "plan", *asked).digest == first.digest
    (tmp_path / "plan" / plan.PLAN).write_text("{")
    with pytest.raises(InputError, match="'plan.json' in 'plan' is damaged"):
        plan.read(tmp_path / "plan")
    with pytest.raises(InputError, match="number of people is 0"):
        planned(tmp_path / "none", "--people", "0", "--poses", "1")


# ------------------------------------------------------------------------------------------------ making


def make(rendered_plan, out, method: str, *options: str) -> dict:
    words = ["make", str(rendered_plan.folder), "--method", method, "--model", "tiny", "--out", str(out), *options]
    return methods.run(parse(words))


@pytest.fixture
def tiny_load(monkeypatch):
    """`checkpoints.load` gives a tiny FaceSnap, which reads any render as a photo of somebody."""
    pipe = tiny_pipeline()
    monkeypatch.setattr(methods.checkpoints, "load", lambda name, device: pipe)
    return pipe


def test_facesnap_and_base_fill_a_folder_and_go_on_where_they_were_killed(rendered_plan, tmp_path, tiny_load):
    made = make(rendered_plan, tmp_path / "ours", "facesnap")
    files = [row.file for row in rendered_plan.rows]
    assert sorted(made) == files and all("seconds" in line for line in made.values())
    before = (tmp_path / "ours" / files[1]).stat().st_mtime_ns
    (tmp_path / "ours" / files[0]).unlink()
    lines = tmp_path / "ours" / "made.0.jsonl"
    lines.write_text(lines.read_text().rpartition('"file"')[0])  # the kill came in the middle of the last line
    assert sorted(make(rendered_plan, tmp_path / "ours", "facesnap")) == files
    assert all((tmp_path / "ours" / file).is_file() for file in files)
    assert (tmp_path / "ours" / files[1]).stat().st_mtime_ns == before  # was there already
    make(rendered_plan, tmp_path / "floor", "base", "--steps", "1")
    picture = Image.open(tmp_path / "floor" / files[0])
    assert picture.size == (SIZE, SIZE)
    with pytest.raises(InputError, match="'ours' was begun with another method"):
        make(rendered_plan, tmp_path / "ours", "base")


def test_a_refusal_is_noted_and_counts_as_a_failure(rendered_plan, tmp_path, tiny_load, monkeypatch):
    def refusing(self, image):
        raise InputError("No face was found.")

    monkeypatch.setattr(type(tiny_load.face_analyser), "analyse", refusing)
    made = make(rendered_plan, tmp_path / "ours", "facesnap")
    assert all("No face was found" in line["failed"] for line in made.values())
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "ours" / "00000.png")
    failures, _ = score.check(tmp_path / "ours", rendered_plan, "refuse")
    assert len(failures) == 3 and "No face" in failures["00001.png"]


def test_a_loop_of_ones_own_goes_on_after_a_kill_and_fills_one_plan_alone(rendered_plan, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend("docs/methods")
    filling = importlib.import_module("fill").fill
    out, sizes = tmp_path / "theirs", []
    monkeypatch.setattr("sys.argv", ["loop", str(rendered_plan.folder), str(out)])

    def make(row, reference):
        sizes.append(reference.size)
        if row["file"] == "00001.png":
            raise ValueError("no face")
        return reference.resize((90, 90))

    filling(make, "theirs")
    assert len(sizes) == 4 and score.check(out, rendered_plan, "refuse")[0] == {"00001.png": "no face"}
    (out / "made.jsonl").write_text((out / "made.jsonl").read_text()[:-5])  # a kill came in the middle of the last line
    filling(make, "theirs")
    assert len(sizes) == 5 and sorted(methods.made(out)) == ["00000.png", "00001.png", "00002.png"]
    (out / "made.jsonl").write_text("00001.png\n")
    with pytest.raises(InputError, match="Line 1 of made.jsonl in 'theirs' is not like"):
        methods.made(out)
    (out / "method.json").write_text('{"plan": "other"}')
    with pytest.raises(SystemExit, match="'theirs' holds the pictures of another plan"):
        filling(make, "theirs")


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("photomaker", {"photomaker/__init__.py": "FaceAnalysis2 = reach; PhotoMakerStableDiffusionXLPipeline = 1; "
         "analyze_faces = 1"}),
        ("pulid", {"pulid/__init__.py": "", "pulid/attention_processor.py": "", "pulid/utils.py":
         "resize_numpy_image_long = 1", "pulid/pipeline_v1_1.py": "PuLIDPipeline = reach"}),
        ("consistentid", {"pipline_StableDiffusionXL_ConsistentID.py": "class ConsistentIDStableDiffusionXLPipeline:"
         " from_pretrained = reach"}),
    ],
)  # fmt: skip
def test_the_loops_of_other_methods_find_their_packages(name, files, tmp_path, monkeypatch):
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(f"def reach(*_, **__): raise SystemExit('reached')\n{text}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend("docs/methods")  # as Python puts a script's own folder first
    with pytest.raises(SystemExit, match="reached"):
        runpy.run_path(f"docs/methods/fill_{name}.py", run_name="__main__")


def test_methods_that_cannot_be_are_named(rendered_plan, tmp_path, tiny_load):
    with pytest.raises(InputError, match="did you mean 'facesnap-fast'"):
        make(rendered_plan, tmp_path / "a", "facesnap-fat")
    with pytest.raises(InputError, match="needs a checkpoint of kind 'instantid'"):
        make(rendered_plan, tmp_path / "b", "instantid")
    with pytest.raises(InputError, match="give --adapter FILE"):
        make(rendered_plan, tmp_path / "c", "ip-adapter-faceid")


def test_ip_adapter_faceid_follows_the_face(rendered_plan, tmp_path, tiny_load):
    unet = tiny_unet()
    torch.manual_seed(3)

    def linear(outputs: int, inputs: int) -> dict:
        return {"weight": torch.randn(outputs, inputs) / inputs**0.5, "bias": torch.zeros(outputs)}

    layers = {"proj.0": linear(1024, 512), "proj.2": linear(4 * TOKEN_DIM, 1024)}
    layers["norm"] = {"weight": torch.ones(TOKEN_DIM), "bias": torch.zeros(TOKEN_DIM)}
    adapter: dict[str, dict] = {
        "image_proj": {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.items()},
        "ip_adapter": {},
    }
    for k, name in enumerate(unet.attn_processors):
        module = unet.get_submodule(name.removesuffix(".processor"))
        width = module.to_q.out_features
        if name.endswith("attn2.processor"):
            adapter["ip_adapter"] |= {f"{k}.to_{x}_ip.weight": torch.randn(width, TOKEN_DIM) for x in "kv"}
        for part in ("q", "k", "v", "out"):
            inputs = module.to_k.in_features if part in "kv" else width
            lora = f"{k}.to_{part}_lora"
            adapter["ip_adapter"] |= {f"{lora}.down.weight": torch.zeros(4, inputs)}
            adapter["ip_adapter"] |= {f"{lora}.up.weight": torch.zeros(width, 4)}
    torch.save(adapter, tmp_path / "faceid.bin")
    options = ("--steps", "2", "--guidance", "2")
    make(rendered_plan, tmp_path / "base", "base", *options)
    make(rendered_plan, tmp_path / "faceid", "ip-adapter-faceid", "--adapter", str(tmp_path / "faceid.bin"), *options)
    both = [np.asarray(Image.open(tmp_path / name / "00000.png"), int) for name in ("faceid", "base")]
    assert np.abs(both[0] - both[1]).max() > 0


def test_a_picture_through_the_vae_keeps_its_form_and_one_is_cut_to_its_middle(tiny_load):
    image = photo(1, size=SIZE)
    assert methods.through_vae(tiny_load.vae, image).shape == image.shape
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = 255
    assert methods.fitted(wide, 20).min() > 200


# ------------------------------------------------------------------------------------- what may be scored


def test_empty_partly_filled_and_foreign_folders_are_refused(rendered_plan, filled, tmp_path):
    with pytest.raises(InputError, match="There is no folder 'nobody'"):
        score.check(tmp_path / "nobody", rendered_plan, "refuse")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="None of the plan's pictures is in 'empty'"):
        score.check(tmp_path / "empty", rendered_plan, "failed")
    (filled / "00002.png").unlink()
    with pytest.raises(InputError, match="lacks 1 of 4 pictures, such as 00002.png"):
        score.check(filled, rendered_plan, "refuse")
    Image.new("RGB", (9, 9)).save(filled / "extra.png")
    failures, notes = score.check(filled, rendered_plan, "failed")
    assert failures == {"00002.png": "not there"} and "1 pictures that the plan does not name" in notes[0]
    (filled / "method.json").write_text(json.dumps({"plan": "other"}))
    with pytest.raises(InputError, match="made for another plan"):
        score.check(filled, rendered_plan, "failed")


def test_pictures_of_the_wrong_size_or_none_at_all_are_named(rendered_plan, filled):
    Image.new("RGB", (SIZE, SIZE // 2)).save(filled / "00001.png")
    with pytest.raises(InputError, match=r"1 pictures in 'ours' .* 00001.png: \(64, 32\) instead of 64 x 64"):
        score.check(filled, rendered_plan, "refuse")
    (filled / "00001.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match="00001.png: no picture"):
        score.check(filled, rendered_plan, "refuse")


# --------------------------------------------------------------------------------------------- looking


class TinyExaminer:
    """Sees the mean colours of a picture's quarters: its vectors, and its face where it is not all grey."""

    clips: tuple = ()

    def look(self, picture: np.ndarray) -> dict:
        side = len(picture) // 2
        colours = picture[: 2 * side, : 2 * side].reshape(2, side, 2, side, 3).mean((1, 3)).ravel() - 100
        if np.ptp(picture) == 0:
            return {"found": False, "reason": "all grey", "vectors": {"features": looks.packed(colours)}}
        seen = {"points": np.zeros((72, 2)).tolist(), "angles": [1, 2, 3], "mouth": 0.1, "brows": 0.2, "sharpness": 4}
        seen["size"] = list(picture.shape[:2])
        return {"found": True, **seen, "vectors": {name: looks.packed(colours) for name in ("features", "face C")}}


def test_looks_go_on_after_a_kill_see_equal_pictures_once_and_changed_ones_anew(tmp_path):
    seen = []

    class Counting(TinyExaminer):
        def look(self, picture):
            seen.append(int(picture[0, 0, 0]))
            return super().look(picture)

    pictures = {}
    for name, value in (("a", 1), ("b", 1), ("c", 3)):
        pictures[name] = tmp_path / f"{name}.png"
        Image.new("RGB", (8, 8), (value, 0, 0)).save(pictures[name])
    settings, work = {"judge": "tiny"}, tmp_path / "looks"
    found = looks.look_at_all(pictures, Counting, settings, work)
    assert seen == [1, 3] and found["a"] == found["b"] != found["c"]
    ledger = work / "looks.0.jsonl"
    (work / "looks.1.jsonl").write_text(ledger.read_text().splitlines(True)[0])  # another process began, and died
    ledger.write_text(ledger.read_text()[:-20])  # in the middle of the last look
    Image.new("RGB", (8, 8), (7, 0, 0)).save(pictures["b"])
    looks.look_at_all(pictures, Counting, settings, work)
    assert sorted(seen[2:]) == [3, 7]
    with pytest.raises(InputError, match=r"looks by other means \(different: judge\)"):
        looks.look_at_all(pictures, Counting, {"judge": "other"}, work)


def test_pictures_that_another_process_left_unseen_are_missed(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    class Two:
        # of one picture all is the other one's, which was killed
        is_main_process, process_index, num_processes = True, 1, 2

        def wait_for_everyone(self):
            pass

    monkeypatch.setattr(looks, "PartialState", Two)
    with pytest.raises(InputError, match="1 of 1 pictures were not looked at, such as a: a process was ended"):
        looks.look_at_all({"a": tmp_path / "a.png"}, TinyExaminer, {}, tmp_path / "looks")


# ---------------------------------------------------------------------------------------------- scoring


@pytest.fixture
def scored(rendered_plan, filled, tmp_path, monkeypatch):
    """run(*folders) scores folders of the rendered plan by the tiny examiner."""
    about = {"judges": {"C": "tiny"}, "clips": {}, "features": {"names": ["FD-mini", "KD-mini"], "of": "tiny"}}

    def examiner(arguments, device):
        found = TinyExaminer()
        found.about, found.extractor = about, SimpleNamespace(names=("FD-mini", "KD-mini"))
        return found

    monkeypatch.setattr(score, "Examiner", examiner)

    def run(*folders, options=()) -> dict:
        words = ["score", str(rendered_plan.folder), *map(str, folders), "--model", "assets/mini"]
        return score.run(parse([*words, "--out", str(tmp_path / "report"), *options]))

    return run


def test_the_truth_scores_as_the_truth_and_greyness_as_failure(scored, filled, tmp_path, rendered_plan):
    grey = tmp_path / "grey"
    grey.mkdir()
    for n, row in enumerate(rendered_plan.rows[1:]):
        Image.new("RGB", (SIZE, SIZE), (90 + n,) * 3).save(grey / row.file)
    found = scored(filled, grey, options=("--missing", "failed"))
    truth, none = found["methods"]["ours"], found["methods"]["grey"]
    assert truth["retention C"]["value"] == pytest.approx(1) and truth["copy-paste C"]["value"] == pytest.approx(-1)
    assert truth["FD-mini"] == pytest.approx(0, abs=0.01) and truth["found"]["value"] == 1
    assert truth["pose_error"]["value"] == 0 and truth["sharpness"]["value"] == 1
    assert none["FaceSim C"] == {"value": 0, "95": [0, 0], "of": 4} and none["found"]["value"] == 0
    assert none["landmark_error"]["value"] == 1 and none["pose_error"] == {"value": None, "of": 0}
    assert none["FD-mini"] > 1 and none["failures"] == {"00000.png": "not there"}

    text = (tmp_path / "report" / "report.md").read_text()
    assert "| FaceSim C |" in text and "grey: 1 rows failed, such as 00000.png: not there" in text
    page = (tmp_path / "report" / "report.html").read_text()
    assert rendered_plan.rows[0].prompt in page and "failed: not there" in page and "all grey" in page
    assert page.count("data:image/jpeg") == 4 * 4 + 4 * 4 - 1  # each row's four pictures, but for the missing one
    assert json.loads((tmp_path / "report" / "report.json").read_text())["plan"]["digest"] == rendered_plan.digest


def test_a_figure_that_is_not_of_all_rows_says_so(scored, filled, tmp_path):
    Image.new("RGB", (SIZE, SIZE), (60, 60, 60)).save(filled / "00002.png")  # no face at all
    found = scored(filled)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| pose_error | 0.000 (0.000 to 0.000) of 3 |" in text
    assert "no face was found" not in text
    assert found["settings"]["real"] == "the plan's true pictures"
    assert "text_accuracy" not in found["methods"]["ours"]  # nobody looked for what the prompts ask for
    blind = found["plan"] | {"faceless": ["references/1.png"]}
    assert "in 1 references, such as references/1.png, no face was found" in score.markdown(found | {"plan": blind})


def test_real_pictures_that_are_not_there_are_named(scored, filled, tmp_path):
    with pytest.raises(InputError, match="no folder 'photos' of real pictures"):
        scored(filled, options=("--real", str(tmp_path / "photos")))
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match="'photos' holds no real pictures"):
        scored(filled, options=("--real", str(tmp_path / "photos")))
    with pytest.raises(InputError, match="No method can be called 'real'"):
        scored(filled.rename(tmp_path / "real"))


def test_two_folders_of_one_name_and_a_method_of_one_picture_are_refused(scored, filled, tmp_path):
    with pytest.raises(InputError, match="the same name"):
        scored(filled, filled)
    for n in (1, 2, 3):
        (filled / f"0000{n}.png").unlink()
    with pytest.raises(InputError, match="FID needs at least 2 pictures"):
        scored(filled, options=("--missing", "failed"))


def test_the_sheet_begins_with_the_worst(scored, filled, tmp_path, rendered_plan):
    Image.new("RGB", (SIZE, SIZE), (50, 60, 70)).save(filled / "00002.png")  # no face at all
    scored(filled, options=("--worst", "1"))
    page = (tmp_path / "report" / "report.html").read_text()
    assert "00002.png" in page and "00000.png" not in page


def test_a_page_shows_prompts_as_text():
    page = html.document("x", html.table("# <b>title</b>\n\n| a | b |\n|---|---|\n| <script> | 1 |\n\n- <i>"))
    assert "<script>" not in page and "&lt;script&gt;" in page and "<b>title" not in page
    assert "of 2" in html.histogram(np.array([1.0, np.nan, 2.0]), "x") and html.histogram(np.array([np.nan]), "x") == ""
