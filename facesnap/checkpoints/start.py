"""An untrained FaceSnap on a base model: what training starts from."""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import CLIPVisionModel

from facesnap.checkpoints import sources as known
from facesnap.checkpoints.loading import ffrnet_place, read_base, read_parts, sample_as
from facesnap.checkpoints.plans import Plan, existing_folder, fetch, find_base
from facesnap.checkpoints.sources import BASES, START_BASE, Source, is_distilled
from facesnap.errors import InputError, did_you_mean, reading, shown
from facesnap.faces import Recogniser
from facesnap.ffrnet import VARIANTS, FFRNet, Variant
from facesnap.folder import SCORER_NAME, SETTINGS_NAME, Settings, read_settings, read_weights
from facesnap.mixer import VARIANTS as MIXERS
from facesnap.mixer import FacialAttributeMixer
from facesnap.mixer import Variant as MixerVariant
from facesnap.pipeline import FaceSnapPipeline

NEW_MIXER = "the mixer, with random weights"
FROM_UNET = (
    "the base UNet's encoder, its timestep and size embeddings included",
    "the drawing's embedding; the outputs, which are zero: nothing changes until it is trained",
)
FROM_INSTANTID = (
    "InstantID's encoder, attention to face tokens and outputs",
    "the drawing's embedding, which adds nothing until it is trained (InstantID drew five points, we draw 72); a "
    "projection of the face where InstantID took the pooled text",
)
FROM_FOLDER = "all of its weights"
DISTILLED = (
    "{0} is a distilled base: what is trained on it learns its shortcuts, and follows other bases worse. Train on {1}, "
    "and make portraits with any base (`checkpoints.load(FOLDER, base=…)`)."
)


def init(
    out: str | Path,
    *,
    base: str | Path | None = None,
    ffrnet: str | Path = "unet",
    mixer: MixerVariant = "full",
    variant: Variant = "predicted",
    face_pack: str | Path | None = None,
    head: str | Path | None = None,
    scorer: str | Path | None = None,
    seed: int = 0,
    yes: bool = False,
) -> FaceSnapPipeline:
    """Write an untrained FaceSnap folder for a base model, whole and in half precision: what training starts from.

    The mixer is new, as wide as the face encoder's states. What was kept of what is noted in the settings,
    under `about["start"]`.

    Args:
        out: the folder to write; it must not exist yet, or be empty.
        base: as in `load`, but by default SDXL base 1.0. A distilled one is warned of: its few steps are not what
            equation 3 trains, and the adapter follows its ways. A FaceSnap folder lends its face encoder, face pack,
            head and scorer too, which are otherwise those of `load`.
        ffrnet: "unet": FFRNet begins as the base UNet's encoder. "instantid": as InstantID's public ControlNet, for
            SDXL bases; research only. Else a folder with an FFRNet, with a ControlNet, or a FaceSnap folder.
        mixer: a row of Table 2: "full", "id", "clip" or "concat".
        variant: a row of Table 3: "predicted", "driver", "black", or "none" (no FFRNet).
        face_pack, head: folders to use instead.
        scorer: an ONNX recogniser that only scores, by default AuraFace's; neither the face pack's nor φ.
        seed: of what is new.
        yes: whether more than 100 MB may be fetched unasked.

    Raises:
        InputError: a name is wrong, something cannot be fetched, read or written, parts do not fit.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"'{out}' is there already and not empty; give another folder.")
    for what, value, choices in (("mixer", mixer, MIXERS), ("variant", variant, VARIANTS)):
        if value not in choices:
            raise InputError(f"There is no {what} '{value}'; choose {', '.join(choices)}.")
    wanted = _start_plan(base, None if variant == "none" else ffrnet, face_pack, head, scorer)
    distilled = is_distilled(wanted.base)
    if distilled:
        warnings.warn(DISTILLED.format(wanted.base, START_BASE), stacklevel=2)
    fetch(wanted, yes)

    dtype = torch.float16  # as it is saved; nothing is computed here
    stock = read_base(wanted, dtype)
    latents = stock.vae.config.latent_channels
    if stock.unet.config.in_channels != latents:
        raise InputError(
            f"The base's UNet takes {stock.unet.config.in_channels} channels, {latents} of them latents, so it is one "
            "for inpainting; begin with the base it was made of, what is trained there serves both."
        )
    given = read_parts(wanted, stock, dtype, ("CPUExecutionProvider",))
    lender = wanted.places.get("base")
    given["scorer"] = Recogniser(_scorer_file(wanted))
    kept, new = "nothing: there is no FFRNet", NEW_MIXER
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        given["mixer"] = _new_mixer(stock, given["face_encoder"], mixer).to(dtype)
        if variant != "none":
            made, kept, also = _first_ffrnet(wanted, stock, ffrnet)
            given["ffrnet"], new = made.to(dtype), f"{new}; {also}" if also else new
    pipe = FaceSnapPipeline.from_pipe(stock, **given)
    start = {"base": wanted.base, "ffrnet": Path(ffrnet).name, "mixer": mixer, "seed": seed, "kept": kept, "new": new}
    about: dict[str, Any] = {"start": start | ({"distilled": True} if distilled else {})}
    if any(not source.commercial for source in wanted.sources.values()):
        names = ", ".join(source.repo for source in wanted.sources.values() if not source.commercial)
        about["license"] = f"no commercial use, because of {names}"
    pipe.settings = _first_settings(wanted, stock, variant, about)
    if lender is None or not (lender / SETTINGS_NAME).is_file():
        sample_as(pipe, wanted.base)
    _write_whole(pipe, out, dtype)
    return pipe


def _start_plan(
    base: str | Path | None,
    ffrnet: str | Path | None,
    face_pack: str | Path | None,
    head: str | Path | None,
    scorer: str | Path | None,
) -> Plan:
    """What an untrained FaceSnap is made of; ffrnet None: there will be none."""
    places: dict[str, Path] = {}
    sources: dict[str, Source] = {}
    chosen = str(base or START_BASE)
    find_base(chosen, places, sources)
    lender = places.get("base")
    lends = lender is not None and (lender / SETTINGS_NAME).is_file()
    for part, given, source in (
        ("face_encoder", None, known.CLIP),
        ("face_pack", face_pack, known.FACE_PACK),
        ("head", head, known.HEAD),
    ):
        if given is not None:
            places[part] = existing_folder(given, part)
        elif lender is not None and lends and (lender / part).is_dir():
            places[part] = lender / part
        else:
            sources[part] = source
    if "head" in sources:
        sources["head_landmarks"] = known.HEAD_LANDMARKS
    lent = lender / "scorer" / SCORER_NAME if lender is not None and lends else None
    if scorer is not None:
        if not os.path.isfile(scorer):
            raise InputError(f"There is no scorer '{shown(scorer, 200)}'; give the ONNX file of a recogniser.")
        places["scorer"] = Path(scorer)
    elif lent is not None and lent.is_file():
        places["scorer"] = lent
    else:
        sources["scorer"] = known.SCORER
    if str(ffrnet) == "instantid":
        files = tuple(file for file in known.INSTANTID.files if file.path.startswith("ControlNetModel/"))
        sources["ffrnet"] = replace(known.INSTANTID, files=files)
    elif ffrnet is not None and str(ffrnet) != "unet":
        if not os.path.isdir(ffrnet):
            hint = did_you_mean(ffrnet, ("unet", "instantid"), "give unet, instantid or the folder of one.")
            raise InputError(f"There is no FFRNet '{shown(ffrnet, 200)}'; {hint}")
        places["ffrnet"] = Path(ffrnet)
    name = chosen if lender is None else lender.name
    base_name = chosen if chosen in BASES else name
    return Plan(f"FaceSnap on {name}", "facesnap", places, sources, base_name, base_was_chosen=True, is_start=True)


def _scorer_file(wanted: Plan) -> Path:
    if "scorer" in wanted.places:
        return wanted.places["scorer"]
    return wanted.place("scorer") / known.SCORER.files[0].path


def _new_mixer(stock: Any, encoder: CLIPVisionModel, variant: MixerVariant) -> FacialAttributeMixer:
    """A mixer that takes the encoder's states and gives what the UNet takes; for ViT-H and SDXL, our default sizes."""
    width = encoder.config.hidden_size
    return FacialAttributeMixer(
        clip_dim=width,
        width=width,
        heads=width // 64 if width % 64 == 0 else encoder.config.num_attention_heads,
        token_dim=stock.unet.config.cross_attention_dim,
        pooled_dim=stock.text_encoder_2.config.projection_dim,
        variant=variant,
    )


def _first_ffrnet(wanted: Plan, stock: Any, ffrnet: str | Path) -> tuple[FFRNet, str, str]:
    """An FFRNet for the base; what of it was kept, and what is new."""
    if "ffrnet" not in wanted.places | wanted.sources:
        return FFRNet.from_unet(stock.unet, vae_scale_factor=stock.vae_scale_factor), *FROM_UNET
    place = ffrnet_place(wanted)
    with reading(f"The FFRNet {place.name} of the checkpoint '{wanted.name}'"):
        made = read_weights(FFRNet, place)
    if "ffrnet" in wanted.places:
        return made, f"{FROM_FOLDER}, of {wanted.place('ffrnet').name}", ""
    widths = made.config.conditioning_embedding_out_channels
    fresh = FFRNet.from_unet(
        stock.unet, vae_scale_factor=stock.vae_scale_factor, conditioning_embedding_out_channels=tuple(widths),
        load_weights_from_unet=False,
    )  # fmt: skip
    made.controlnet_cond_embedding = fresh.controlnet_cond_embedding
    return made, *FROM_INSTANTID


def _first_settings(wanted: Plan, stock: Any, variant: Variant, about: dict[str, Any]) -> Settings:
    lender = wanted.places.get("base")
    if lender is not None and (lender / SETTINGS_NAME).is_file():
        settings = read_settings(lender)
    else:
        side = stock.unet.config.sample_size
        size = stock.vae_scale_factor * side if isinstance(side, int) else Settings.size
        settings = Settings(size=size, steps=30, guidance=5.0)  # what SDXL wants, unless it is a base we know
    about = settings.about | about
    return replace(
        settings, name=f"FaceSnap on {wanted.base}, untrained", kind="facesnap", variant=variant, about=about
    )


def _write_whole(pipe: FaceSnapPipeline, out: Path, dtype: torch.dtype) -> None:
    """The folder, or nothing of it."""
    draft = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        pipe.save_pretrained(draft, dtype=dtype)
        if out.is_dir():
            out.rmdir()  # it is empty
        draft.rename(out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise InputError(f"'{out}' could not be written ({error}); make room on the disk, or give another.") from error
