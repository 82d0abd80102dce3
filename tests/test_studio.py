"""The studio: photographs read, portraits made on a GPU that may be borrowed, errors as sentences."""

import json
import pickle
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
from calls import studio_order
from PIL import Image
from served import idle

from facesnap.errors import InputError
from facesnap.web.denoise import Step, gpu_seconds
from facesnap.web.door import for_visitors, visitor_of
from facesnap.web.endpoints import MOST_AT_ONCE
from facesnap.web.line import Busy, Visitor
from facesnap.web.request import MAX_SEED, SPECS, STYLES, PortraitRequest, frame
from facesnap.web.studio import READINGS_OF_ADDRESS, Look, Portrait, Studio, Waiting
from facesnap.web.words import likeness, sentence, unknown_words


def test_closing_the_generator_ends_the_worker_within_one_step_and_leaves_the_pipeline_clean(pipe, files):
    seen = []

    class Counted:
        def __getattr__(self, name):
            return getattr(pipe, name)

        def __call__(self, *args, callback_on_step_end, **kwargs):
            def counted(pipe_, step, timestep, tensors):
                seen.append(step)
                for _ in range(3000 if step == 1 else 1):  # the second step lasts until it is ended
                    told = callback_on_step_end(pipe_, step, timestep, tensors)
                    time.sleep(0.01)
                return told

            return pipe(*args, callback_on_step_end=counted, **kwargs)

    making = Studio(Counted()).make(studio_order(files, steps=40))
    assert isinstance(next(making), Look)
    assert next(making) == Step(1, 40)
    making.close()
    assert seen == [0, 1] and idle()
    assert not pipe.unet._forward_pre_hooks


def test_a_photo_is_kept_only_for_a_head_model_that_reads_it(pipe, files, monkeypatch):
    analyse = pipe.face_analyser.analyse
    monkeypatch.setattr(pipe.face_analyser, "analyse", lambda image, **_: replace(analyse(image), image=image))
    studio = Studio(pipe)
    assert studio.read(files.ann, "The photo").face.image is None
    monkeypatch.setattr(type(pipe.head_model), "reads_pictures", True)
    assert studio.read(files.ann, "The photo").face.image is not None


def test_closing_while_waiting_leaves_the_line(pipe, files):
    studio = Studio(pipe)
    with studio.portraits.turn():
        making = studio.make(studio_order(files))
        assert [type(next(making)) for _ in range(2)] == [Look, Waiting]
        making.close()
    with studio.portraits.turn() as ahead:
        assert ahead(0) == 0


def test_the_portraits_files_go_when_they_were_taken(pipe, files):
    making = Studio(pipe).make(studio_order(files, count=2))
    portraits = []
    for event in making:
        if isinstance(event, Portrait):
            portraits.append(event)
            assert all(Path(portrait.path).exists() for portrait in portraits)
    assert len(portraits) == 2 and not [p for p in portraits if Path(p.path).exists()]


def test_a_portraits_file_says_what_it_takes_to_make_it_again(pipe, files):
    asked = studio_order(files, prompt="a hat", yaw=12, expressions={"smile": 0.5}, identity_strength=0.5)
    with closing(Studio(pipe).make(asked)) as events:
        portrait = next(event for event in events if isinstance(event, Portrait))
        text = Image.open(portrait.path).text
    assert json.loads(text["turn"])["yaw"] == 12 and json.loads(text["expressions"]) == {"smile": 0.5}
    assert (text["prompt"], text["seed"], text["steps"], text["identity_strength"]) == ("a hat", "1", "3", "0.5")


def test_all_that_crosses_to_a_borrowed_gpu_can_be_pickled_and_faces_stay_here(pipe, files):
    """Where GPUs are lent, the denoising generator runs in a fork: arguments and results go through pickle."""
    crossed = []

    def borrowed(generator):
        def over_there(preview, arguments):
            crossed.append(pickle.loads(pickle.dumps((preview, arguments))))
            for event in generator(*crossed[-1]):
                yield pickle.loads(pickle.dumps(event))

        return over_there

    *_, portrait = (e.report for e in Studio(pipe, on_gpu=borrowed).make(studio_order(files)) if type(e) is Portrait)
    preview, arguments = crossed[0]
    assert portrait["identity_score"] is not None and len(preview.reference_faces) == 1
    assert not [value for value in arguments.values() if isinstance(value, np.ndarray | bytes)]


@pytest.mark.parametrize(
    ("error", "said"),
    [(InputError("The tiny model wants a hat."), "The tiny model wants a hat."), (RuntimeError("x"), "Something went")],
)
def test_errors_come_back_from_a_borrowed_gpu_as_sentences(pipe, files, error, said):
    """Of what is raised over there, `spaces` hands on the name of its type and no more."""

    class Failing:
        def __getattr__(self, name):
            return getattr(pipe, name)

        def __call__(self, *args, **kwargs):
            raise error

    def borrowed(generator):
        def over_there(*given):
            try:
                for event in generator(*given):
                    yield pickle.loads(pickle.dumps(event))
            except Exception as raised:
                raise gr.Error(type(raised).__name__) from None

        return over_there

    with pytest.raises(InputError, match=said):
        list(Studio(Failing(), on_gpu=borrowed).make(studio_order(files)))


def test_the_hosts_own_errors_are_shown_as_text():
    quota = gr.Error('You have exceeded your quota. <a href="https://x.test/?a=1&amp;b">Subscribe</a> for more.')
    assert for_visitors(quota) == "You have exceeded your quota. Subscribe for more."


def test_a_borrowed_gpu_is_asked_for_as_long_as_the_request_takes(pipe, files):
    asked = []

    def lend(generator):
        def gpu(preview, arguments):
            asked.append(gpu_seconds(preview, arguments))
            yield from generator(preview, arguments)

        return gpu

    studio = Studio(pipe, on_gpu=lend)
    list(studio.make(studio_order(files, steps=2)))
    list(studio.make(studio_order(files, steps=8, count=2)))  # each picture asks anew
    assert asked[0] < asked[1] == asked[2] < 60

    wide = SimpleNamespace(drawing=np.zeros((1024, 1536, 3)))
    square = SimpleNamespace(drawing=np.zeros((1024, 1024, 3)))
    assert gpu_seconds(square, {"num_inference_steps": 50}) < gpu_seconds(wide, {"num_inference_steps": 50}) <= 120


def test_limits_are_checked_in_the_handler_too(pipe, files):
    for name, spec in SPECS.items():
        if spec.kind == "number" and spec.high:
            for value in (spec.low - 1, spec.high + 1, "x", float("nan"), 10**400, True):
                with pytest.raises(InputError, match=name.replace("_", " ")):
                    studio_order(files, **{name: value}).check(pipe)


def test_what_programs_send_is_read_and_not_bent():
    read = PortraitRequest.parse
    assert read({"steps": "8", "yaw": "7.5", "seed": 8.0, "guidance": None}) == PortraitRequest(
        steps=8, yaw=7.5, seed=8
    )
    assert read({"pose_photo": "a.png"}).pose == "another photo"
    assert read({"pose_photo": "a.png", "pose": "front"}).pose == "front"
    assert read({"steps": "eight"}).steps == "eight"  # which `check` refuses


def test_a_pose_photo_beside_a_template_is_refused_in_words(pipe, files):
    with pytest.raises(InputError, match='the pose is "front"'):
        studio_order(files, pose="front", pose_photo=files.bob).check(pipe)


def test_the_work_of_one_request_has_an_end(pipe, files):
    studio_order(files, steps=40, count=4).check(pipe)
    with pytest.raises(InputError, match="fewer pictures"):
        studio_order(files, steps=50, count=4).check(pipe)


def test_every_seed_that_is_told_can_be_asked_for(pipe, files):
    studio_order(files, seed=MAX_SEED - 1, count=2).check(pipe)
    with pytest.raises(InputError, match=f"last picture's seed would be {MAX_SEED + 1}"):
        studio_order(files, seed=MAX_SEED, count=2).check(pipe)


def test_likeness_has_a_word_for_every_score_and_each_checkpoint_its_own(pipe):
    words = [likeness(score, pipe.settings) for score in (-1.0, 0.3, 0.5, 0.9, None)]
    assert len(set(words)) == 5 and "no face" in words[-1]
    own = replace(pipe.settings, about={"likeness": [[0.4, "alike"], [-1, "not alike"]]})
    assert [likeness(score, own) for score in (0.5, 0.1)] == ["alike", "not alike"]


def test_a_small_model_names_the_words_it_has_never_seen(pipe):
    class Captions:
        def __len__(self):
            return 500

        def tokenize(self, word):
            return [word] if word in ("wearing", "red") else list(word)

    assert unknown_words("wearing red", Captions()) == []
    assert "“sea”" in unknown_words("Wearing a RED hat by the sea, 42", Captions())[0]
    assert unknown_words("anything", range(49408)) == []


def test_a_hard_photograph_lets_others_pass_and_fails_but_once(pipe, files, monkeypatch):
    studio, calls = Studio(pipe), []
    analyse = pipe.face_analyser.analyse

    def counted(image, *, hard=None):
        calls.append(len(studio.readings.served))
        with hard:
            calls.append((len(studio.readings.served), len(studio.hard_readings.served)))
            with studio.readings.wait():  # somebody else's photo is read meanwhile
                raise InputError("No face was found.")

    monkeypatch.setattr(pipe.face_analyser, "analyse", counted)
    for _ in range(2):
        with pytest.raises(InputError, match="The photo: No face"):
            studio.read(files.faceless, "The photo")
    assert calls == [1, (0, 1)]
    monkeypatch.setattr(pipe.face_analyser, "analyse", analyse)
    assert studio.read(files.ann, "The photo").face.count == 1


def test_one_address_takes_few_of_the_places_where_photographs_are_read(pipe, files):
    studio = Studio(pipe)
    for line in (studio.readings, studio.hard_readings):
        with ExitStack() as asked:
            for session in range(READINGS_OF_ADDRESS):
                asked.enter_context(line.turn(Visitor("8.8.8.8", f"tab {session}")))
            with (
                pytest.raises(Busy, match="Your address has 8 requests in line already"),
                line.wait(Visitor("8.8.8.8")),
            ):
                pass
            asked.enter_context(line.turn(Visitor("9.9.9.9")))
    assert READINGS_OF_ADDRESS < MOST_AT_ONCE / 4


def test_what_the_log_keeps_of_an_error_is_not_what_a_visitor_wrote(caplog):
    written = "a prompt, /home/" + "me.jpg"
    try:
        raise RuntimeError(written)
    except RuntimeError as error:
        assert "number" in sentence(error)
    assert "RuntimeError" in caplog.text and "a prompt" not in caplog.text and "me.jpg" not in caplog.text


def test_visitors_are_told_apart_behind_a_proxy():
    def ask(peer, forwarded=""):
        client, headers = SimpleNamespace(host=peer), {"x-forwarded-for": forwarded} if forwarded else {}
        return visitor_of(SimpleNamespace(client=client, headers=headers, session_hash="s")).address

    assert ask("127.0.0.1") == "127.0.0.1"
    assert ask("10.0.0.1", "6.6.6.6, 8.8.8.8, 10.0.0.7") == "8.8.8.8"  # what a caller writes stands before it
    assert ask("8.8.8.8", "1.1.1.1") == "8.8.8.8"


def test_styles_put_words_around_the_prompt(files):
    words = {style.name: studio_order(files, prompt="a hat", style=style.name).words()[0] for style in STYLES}
    assert words["no style"] == "a hat" and words["photo"] == "a photo of a person, a hat"
    assert all("a hat" in text for text in words.values()) and len(set(words.values())) == len(STYLES)
    assert studio_order(files, style="photo").words()[0] == "a photo of a person"
    negative = studio_order(files, negative_prompt="rain", style="comic").words()[1]
    assert negative.startswith("rain, ")


@pytest.mark.parametrize(("aspect", "wanted"), [("1:1", (1024, 1024)), ("3:4", (896, 1152)), ("3:2", (1280, 832))])
def test_aspects_keep_the_area(aspect, wanted):
    assert frame(aspect, 1024, 64) == wanted


def test_a_box_that_was_emptied_is_the_default_and_no_size_is_said():
    assert PortraitRequest.of_photos((), yaw=None, style=None) == PortraitRequest()
    for aspect, side in (("1:1", None), ("1:1", float("nan")), ("5:1", 1024), (None, 1024)):
        with pytest.raises(InputError, match="size must be a number of pixels, and the aspect one of 1:1"):
            frame(aspect, side, 64)
