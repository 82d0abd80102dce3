"""Words for the rendered pictures.

Two captions each (design: who controls what): `prompt` names only what a prompt controls (glasses, hat, clothes,
background, light, style, and sometimes the expression), `rich` also describes the face, for the face encoder.
"""

from collections.abc import Callable, Sequence

import numpy as np

from facesnap.synthetic.parameters import Picture

STYLE_WORDS = {
    "photo": ("a photo of", "a portrait photo of", "a photograph of", "a studio photo of"),
    "pencil sketch": ("a pencil sketch of", "a pencil drawing of", "a portrait in pencil of"),
    "watercolor": ("a watercolor painting of", "a watercolor of", "a watercolor portrait of"),
    "oil painting": ("an oil painting of", "a painted oil portrait of"),
    "black and white": ("a black and white photo of", "a black and white portrait of"),
}
LIGHT_WORDS = {
    "soft": ("soft light", "even light"),
    "left": ("light from the left", "side light from the left"),
    "right": ("light from the right", "side light from the right"),
    "warm": ("warm light", "golden light"),
    "cool": ("cool light", "cold blue light"),
}
HARD_LIGHT_WORDS = {
    "left": ("hard light from the left", "harsh side light from the left"),
    "right": ("hard light from the right", "harsh side light from the right"),
}
EXPOSURE_WORDS = {"dark": ("in dim light", "underexposed"), "bright": ("in bright light", "overexposed")}
HAIRCUT_WORDS = {
    "long": "long {} hair", "bob": "a {} bob", "bun": "{} hair in a bun", "curly": "curly {} hair",
    "long curly": "long curly {} hair", "short": "short {} hair", "buzzed": "buzzed {} hair",
    "fringe": "{} hair with a fringe", "bald": "a bald head", "balding": "a bald top and {} hair at the sides",
}  # fmt: skip
BEARD_WORDS = {
    "stubble": "stubble",
    "beard": "a full beard",
    "moustache": "a moustache",
    "goatee": "a goatee",
}
EXPRESSION_WORDS = {"neutral": "a neutral face"}


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def background_words(kind: str, colour: str) -> str:
    return {
        "studio": f"{article(colour)} studio background",
        "plain": f"a plain {colour} background",
        "bokeh": f"{article(colour)} background with blurred lights",
        "hills": f"{colour} hills and sky in the background",
    }[kind]


def clothes_words(pattern: str, colour: str) -> str:
    return {
        "plain": article(f"{colour} shirt"),
        "striped": article(f"{colour} striped shirt"),
        "jacket": article(f"{colour} jacket"),
    }[pattern]


def subject_words(attributes: dict) -> str:
    if attributes["age"] in ("old", "mature"):
        return article(f"{attributes['age']} {attributes['gender']}")
    return "a " + kind_words(attributes)


def kind_words(attributes: dict) -> str:
    """What a prompt may call somebody: it says no more of the face than that."""
    if attributes["age"] == "child":
        return "girl" if attributes["gender"] == "woman" else "boy"
    return attributes["gender"]


def face_words(attributes: dict) -> list[str]:
    """What the reference controls."""
    colour = {"salt and pepper": "salt and pepper"}.get(attributes["graying"], attributes["hair"])
    hair = HAIRCUT_WORDS[attributes["haircut"]].format(colour)
    if attributes["graying"] == "temples":
        hair += " graying at the temples"
    out = [f"{attributes['skin']} skin", f"{attributes['eyes']} eyes", hair]
    if attributes["beard"] != "none":
        out.append(BEARD_WORDS[attributes["beard"]])
    if attributes["freckles"]:
        out.append("freckles")
    if attributes["mole"]:
        out.append("a mole")
    return out


def scene_words(attributes: dict) -> dict[str, str]:
    """What the prompt controls, a phrase for each attribute that is there to be named."""
    out = {"clothes": "wearing " + clothes_words(attributes["pattern"], attributes["clothes_color"])}
    if attributes["glasses"] != "none":
        out["glasses"] = f"{attributes['glasses']} glasses"
    if attributes["hat"] != "none":
        out["hat"] = article(f"{attributes['hat_color']} {attributes['hat']}")
    out["background"] = background_words(attributes["background"], attributes["background_color"])
    return out


def light_words(attributes: dict, named: bool, pick: Callable[[Sequence[str]], str]) -> list[str]:
    """Usual light is named if `named`; hard light and unusual exposure always: what is not named must not appear."""
    out = []
    if attributes["shadows"] == "hard":
        out.append(pick(HARD_LIGHT_WORDS[attributes["light"]]))
    elif named:
        out.append(pick(LIGHT_WORDS[attributes["light"]]))
    if attributes["exposure"] != "normal":
        out.append(pick(EXPOSURE_WORDS[attributes["exposure"]]))
    return out


def captions(picture: Picture, index: int = 0) -> tuple[str, str]:
    """(prompt, rich) for a picture; wording and what is left out vary with the seed."""
    rng = np.random.default_rng([picture.person.seed, 3, index])
    a, who = picture.attributes, picture.person.attributes

    def pick(options):
        return options[int(rng.integers(len(options)))]

    def some(probability):
        return rng.random() < probability

    style = pick(STYLE_WORDS[picture.style])
    neutral_subject = some(0.5)
    subject = "a person" if neutral_subject else "a " + kind_words(who)
    scene = scene_words(a)
    mood = EXPRESSION_WORDS.get(a["expression"], a["expression"])
    parts = []
    if some(0.5):
        parts.append(mood)
    if some(0.85):
        parts.append(scene["clothes"])
    for name in ("glasses", "hat"):  # always named: what is not named must not appear
        if name in scene:
            parts.append("wearing " + scene[name])
    if some(0.9):
        parts.append(scene["background"])
    light = light_words(a, some(0.6), pick)
    prompt = ", ".join([f"{style} {subject}", *parts, *light])

    features = face_words(who)
    keep = [f for f in features if some(0.85)] or features[:1]
    rich = f"{style} {subject_words(who)} with {' and '.join(keep)}"
    extras = [mood] + [scene[k] if k == "background" or k == "clothes" else "wearing " + scene[k] for k in scene]
    return prompt, ", ".join([rich, *[e for e in extras if some(0.7)]])
