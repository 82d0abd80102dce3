"""PuLID v1.1 (SDXL) on a plan. Written from the project's README and demo; not tried here.

git clone https://github.com/ToTheBeginning/PuLID && pip install -r PuLID/requirements.txt
PYTHONPATH=PuLID python docs/methods/fill_pulid.py PLAN pulid
"""

import numpy as np
import torch
from fill import fill
from PIL import Image
from pulid import attention_processor as attention
from pulid.pipeline_v1_1 import PuLIDPipeline
from pulid.utils import resize_numpy_image_long

BASE, SAMPLER, STEPS, GUIDANCE, SCALE = "RunDiffusion/Juggernaut-XL-v9", "dpmpp_2m", 25, 7.0, 0.8  # the demo's own
NEGATIVE = "flaws in the eyes, flaws in the face, lowres, low quality, worst quality, deformed, blurry, text, watermark"


@torch.inference_mode()
def main() -> None:
    pipeline = PuLIDPipeline(sdxl_repo=BASE, sampler=SAMPLER)
    attention.NUM_ZERO, attention.ORTHO, attention.ORTHO_v2 = 20, False, True

    def make(row: dict, reference: Image.Image) -> Image.Image:
        try:
            nobody, person = pipeline.get_id_embedding([resize_numpy_image_long(np.array(reference), 1024)])
        except RuntimeError as error:
            if "align face" not in str(error):
                raise
            raise ValueError("PuLID found no face in the reference") from error
        seed, size = int(row["seed"]), (1, 1024, 1024)
        made = pipeline.inference(row["prompt"], size, NEGATIVE, person, nobody, SCALE, GUIDANCE, STEPS, seed)[0]
        return made if isinstance(made, Image.Image) else Image.fromarray(np.array(made))

    fill(make, "PuLID v1.1")


if __name__ == "__main__":
    main()
