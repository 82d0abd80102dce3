"""diffusers' own tests of pipelines, by ours and by the stock SDXL pipeline with the same tiny parts.

    pip install parameterized requests-mock
    git clone --depth 1 --branch v0.40.0 https://github.com/huggingface/diffusers ../diffusers
    python benchmarks/diffusers_tests.py ../diffusers

All run on the CPU, those for accelerators too, with the CPU in the GPU's place. Four things stand in for what the
tests take for granted: weights are saved as safetensors where a test asks for pickles; our class is found among
diffusers' own; the pipeline that one test fetches is the tiny one; accelerate, which takes "cpu:0" for another device
than "cpu", is told "cpu".
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import unittest
import warnings
from pathlib import Path
from typing import Any

import accelerate.hooks
import diffusers
import torch

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
from tiny import TinyAnalyser, TinyScorer, photo, tiny_pipeline  # noqa: E402

import facesnap.folder  # noqa: E402
from facesnap.folder import BASE_PARTS  # noqa: E402
from facesnap.pipeline import FaceSnapPipeline  # noqa: E402

Stock = diffusers.StableDiffusionXLPipeline
MIXINS = ("SDFunction", "IPAdapter", "PipelineLatent", "PipelineFromPipe", "PipelineKarrasScheduler", "Pipeline")


class Given:
    """What a test asks of a class of tests: the parts, and the arguments of a call."""

    original_pipeline_class = Stock
    test_layerwise_casting = test_group_offloading = True

    def get_dummy_components(self) -> dict[str, Any]:
        parts = tiny_pipeline(latent_channels=4).components
        spacing = {"beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1, "timestep_spacing": "leading"}
        parts["scheduler"] = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", **spacing)
        names = (
            parts if self.pipeline_class is FaceSnapPipeline else (*BASE_PARTS, "image_encoder", "feature_extractor")
        )
        return {name: parts[name] for name in names}

    def get_dummy_inputs(self, device, seed: int = 0) -> dict[str, Any]:
        call = {"prompt": "a painting", "num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "np"}
        call |= {"height": 64, "width": 64, "generator": torch.Generator(device).manual_seed(seed)}
        return call | ({"reference": photo(1)} if self.pipeline_class is FaceSnapPipeline else {})


def stand_ins() -> None:
    facesnap.folder.FaceAnalyser, facesnap.folder.Recogniser = TinyAnalyser, TinyScorer
    diffusers.pipelines.FaceSnapPipeline = FaceSnapPipeline
    save, load, put = (
        FaceSnapPipeline.save_pretrained,
        Stock.from_pretrained,
        accelerate.hooks.set_module_tensor_to_device,
    )
    FaceSnapPipeline.save_pretrained = lambda self, *place, safe_serialization=True, **how: save(self, *place, **how)
    tiny, folder = tiny_pipeline(latent_channels=4), tempfile.mkdtemp()
    Stock(**{name: getattr(tiny, name) for name in BASE_PARTS}).save_pretrained(folder)
    fetched = lambda name, **how: load(folder if str(name).startswith("hf-internal-testing/") else name, **how)  # noqa: E731
    Stock.from_pretrained = staticmethod(fetched)
    accelerate.hooks.set_module_tensor_to_device = lambda module, name, device, **how: put(
        module, name, "meta" if device == "meta" else "cpu", **how
    )


def results(pipeline: Any, common: Any, params: Any) -> dict[str, str]:
    """What came of each test: passed, skipped, or the error's first line."""
    mixins = tuple(getattr(common, f"{name}TesterMixin") for name in MIXINS)
    callback = params.TEXT_TO_IMAGE_CALLBACK_CFG_PARAMS | {"add_text_embeds", "add_time_ids"}
    images, prompts = params.TEXT_TO_IMAGE_IMAGE_PARAMS, params.TEXT_TO_IMAGE_BATCH_PARAMS
    wanted = {"params": params.TEXT_TO_IMAGE_PARAMS, "batch_params": prompts, "callback_cfg_params": callback}
    wanted |= {"pipeline_class": pipeline, "image_params": images, "image_latents_params": images}
    tests = type("Tests", (Given, *mixins, unittest.TestCase), wanted)
    outcome = {}
    for test in unittest.TestLoader().loadTestsFromTestCase(tests):
        report = unittest.TestResult()
        test.run(report)
        wrong = [text.strip().splitlines()[-1] for _, text in report.errors + report.failures]
        skipped = [f"skipped: {why}" for _, why in report.skipped]
        outcome[test._testMethodName] = (wrong or skipped or ["passed"])[0]
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="of diffusers, with its tests")
    sys.path.insert(0, str(parser.parse_args().checkout))
    warnings.simplefilter("ignore")
    from tests.pipelines import pipeline_params, test_pipelines_common

    stand_ins()
    stock, ours = (results(kind, test_pipelines_common, pipeline_params) for kind in (Stock, FaceSnapPipeline))
    for name in stock:
        if (stock[name], ours[name]) != ("passed", "passed"):
            print(f"{name}\n    stock: {stock[name][:150]}\n    ours:  {ours[name][:150]}")
    both = [sum(came == "passed" for came in tests.values()) for tests in (stock, ours)]
    print(f"{len(stock)} tests by diffusers {diffusers.__version__}: {both[0]} passed by stock, {both[1]} by ours")


if __name__ == "__main__":
    main()
