"""PhotoMaker v2 on a plan. Written from the project's README and example script; not tried here.

git clone https://github.com/TencentARC/PhotoMaker && pip install -e PhotoMaker insightface onnxruntime-gpu
python docs/methods/fill_photomaker.py PLAN photomaker
"""

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler
from fill import fill
from huggingface_hub import hf_hub_download
from photomaker import FaceAnalysis2, PhotoMakerStableDiffusionXLPipeline, analyze_faces
from PIL import Image

NEGATIVE = "(asymmetry, worst quality, low quality, illustration, 3d, 2d, painting, cartoons, sketch), open mouth"


def main() -> None:
    detector = FaceAnalysis2(providers=["CUDAExecutionProvider"], allowed_modules=["detection", "recognition"])
    detector.prepare(ctx_id=0, det_size=(640, 640))
    pipe = PhotoMakerStableDiffusionXLPipeline.from_pretrained("SG161222/RealVisXL_V4.0", torch_dtype=torch.bfloat16)
    pipe.to("cuda")
    weights = hf_hub_download("TencentARC/PhotoMaker-V2", "photomaker-v2.bin").rsplit("/", 1)
    pipe.load_photomaker_adapter(weights[0], subfolder="", weight_name=weights[1], trigger_word="img")
    pipe.fuse_lora()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)

    def make(row: dict, reference: Image.Image) -> Image.Image:
        faces = analyze_faces(detector, np.array(reference)[:, :, ::-1])
        if not faces:
            raise ValueError("PhotoMaker found no face in the reference")
        # the trigger word must follow the noun that names the person
        prompt = row["prompt"].replace("a person", "a person img", 1)
        return pipe(
            prompt if "img" in prompt else f"a person img, {prompt}",
            negative_prompt=NEGATIVE,
            input_id_images=[reference],
            id_embeds=torch.from_numpy(faces[0]["embedding"])[None],
            start_merge_step=10,
            generator=torch.Generator("cuda").manual_seed(int(row["seed"])),
        ).images[0]

    fill(make, "PhotoMaker v2")


if __name__ == "__main__":
    main()
