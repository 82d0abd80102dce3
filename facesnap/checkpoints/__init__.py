"""A name, a folder or a Hub id → a ready pipeline. The only room that downloads, and only what was asked for.

    python -m facesnap.checkpoints show instantid      what it would fetch: repository, size, licence, cached or not
    python -m facesnap.checkpoints fetch instantid     fetch it now (asks first; --yes for scripts)
    python -m facesnap.checkpoints check assets/mini   keys, shapes and dtypes of a folder, and what is missing
    python -m facesnap.checkpoints init --out START    an untrained FaceSnap on a base model, for facesnap.training

| name | what it is |
|---|---|
| mini | the model in this repository; nothing is fetched |
| instantid | InstantID's public weights with our Landmark Predictor, until FaceSnap weights for SDXL exist |
| a folder, or a Hub id | FaceSnap weights; what they lack is taken from the sources below |

The weights lie on a base model: any SDXL in diffusers' folders, on the Hub or in one safetensors file.

    sources.py   the public files, and how each is fetched
    plans.py     a name → what it needs; `show` and `fetch`
    verify.py    what is wrong with a folder
    loading.py   a plan → a pipeline
    start.py     an untrained FaceSnap
"""

from facesnap.checkpoints.loading import load
from facesnap.checkpoints.plans import fetch, plan, show
from facesnap.checkpoints.sources import TURBO
from facesnap.checkpoints.start import init
from facesnap.checkpoints.verify import check

__all__ = ["TURBO", "check", "fetch", "init", "load", "plan", "show"]
