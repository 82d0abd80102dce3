"""ConsistentID (SDXL) on a plan. Written from the project's README and example script; not tried here.

git clone https://github.com/JackAILab/ConsistentID && pip install -r ConsistentID/requirements.txt
(ConsistentID_SDXL-v1.bin and face_parsing.pth of the Hub's JackAILab/ConsistentID into ConsistentID/weights)
PYTHONPATH=ConsistentID python docs/methods/fill_consistentid.py PLAN consistentid
"""

import tempfile

import torch
from diffusers import EulerDiscreteScheduler
from fill import fill
from PIL import Image
from pipline_StableDiffusionXL_ConsistentID import ConsistentIDStableDiffusionXLPipeline

BASE, WEIGHTS, ENCODER = "SG161222/RealVisXL_V3.0", "ConsistentID/weights", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
NEGATIVE = "(worst quality, low quality, illustration, 3d, 2d, painting, cartoons, sketch), open mouth"


def main() -> None:
    pipe = ConsistentIDStableDiffusionXLPipeline.from_pretrained(BASE, torch_dtype=torch.float16, variant="fp16")
    pipe.to("cuda")
    pipe.load_ConsistentID_model(
        WEIGHTS,
        image_encoder_path=ENCODER,
        bise_net_cp=f"{WEIGHTS}/face_parsing.pth",
        subfolder="",
        weight_name="ConsistentID_SDXL-v1.bin",
        trigger_word="img",
    )
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)

    def make(row: dict, reference: Image.Image) -> Image.Image:
        with tempfile.NamedTemporaryFile(suffix=".png") as file:  # it wants the picture and its path
            reference.save(file.name)
            return pipe(
                prompt=row["prompt"],
                width=1024,
                height=1024,
                input_id_images=reference,
                input_image_path=file.name,
                negative_prompt=NEGATIVE,
                num_inference_steps=50,
                start_merge_step=30,
                generator=torch.Generator("cuda").manual_seed(int(row["seed"])),
            ).images[0]

    fill(make, "ConsistentID")


if __name__ == "__main__":
    main()
