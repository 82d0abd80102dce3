"""The mini's VAE: pictures of 256² to latents of 32 × 16 × 16 and back.

It is a stock diffusers `AutoencoderKL`, so that a stock `StableDiffusionXLPipeline` loads it. That
pipeline knows one scaling factor for all channels; ours have a mean and a deviation each, which are
folded into the 1 × 1 convolutions around the latents when training ends (`fold_normalisation`), and the
factor is 1.

    python -m facesnap.mini.nets.vae --data DIR --out DIR --export DIR --minutes M
    python -m facesnap.mini.nets.vae … --start DIR --critic           # and texture: the last third of the training
    python -m facesnap.mini.nets.vae … --latents FILE --start DIR     # the decoder alone: latents stay what they were
    torchrun --nproc-per-node 2 -m facesnap.mini.nets.vae … --steps N # by processes, which count steps

Training goes by crops of 128², more often around the eyes and the mouth, which are small and matter most, and
weighs them up in the loss as well. Encoder and decoder learn together. `--features` asks that frozen nets read the
decoded face as they read the true one.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from facesnap.faces import five_points
from facesnap.landmarks import to_68
from facesnap.metrics import sharpness
from facesnap.mini.nets.vae_losses import FaceFeatures, PatchCritic
from facesnap.synthetic.dataset import BACKGROUND, CLOTHES, People, load_people
from facesnap.training.checkpointing import write_whole
from facesnap.training.trainer import Batch, Stage, Trainer, TrainerConfig

LATENT_CHANNELS = 32
WIDTHS = (16, 16, 48, 96, 128)  # thin where the picture is large: that is where the time goes
# Noise on the latents that are decoded, in deviations of theirs, from none to this much over a batch, seldom much: what
# a denoiser makes is not exact
MOST_NOISE = 0.3
VALIDATION = 40  # one person in so many is never trained on


def make_vae(widths: Sequence[int] = WIDTHS, channels: int = LATENT_CHANNELS) -> AutoencoderKL:
    """A fresh VAE; each width after the first halves the picture."""
    levels = len(widths)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(widths),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=256,
        scaling_factor=1.0,
        force_upcast=False,
    )
    # Start with little noise on the latents (σ = e^-2): a picture that gets through teaches more.
    nn.init.constant_(vae.quant_conv.bias[channels:], -4.0)
    return vae


@torch.no_grad()
def widened(old: AutoencoderKL, channels: int) -> AutoencoderKL:
    """A VAE with more latent channels that begins where `old` stands: its latents are the first ones, and the decoder
    makes little of the others yet."""
    before = old.config.latent_channels
    vae = make_vae(old.config.block_out_channels, channels)
    fresh = vae.state_dict()
    moments = torch.cat([torch.arange(before), channels + torch.arange(before)])  # means, then log variances
    # of the new channels: the 1 × 1 convolutions pass them on, and the decoder begins with little of them
    fresh["quant_conv.weight"][:] = torch.eye(2 * channels)[..., None, None]
    fresh["post_quant_conv.weight"][:] = torch.eye(channels)[..., None, None]
    fresh["post_quant_conv.bias"][:] = 0
    fresh["decoder.conv_in.weight"] *= 0.3
    places = {
        "encoder.conv_out.weight": moments,
        "encoder.conv_out.bias": moments,
        "quant_conv.weight": (moments[:, None], moments),
        "quant_conv.bias": moments,
        "post_quant_conv.weight": np.s_[:before, :before],
        "post_quant_conv.bias": np.s_[:before],
        "decoder.conv_in.weight": np.s_[:, :before],
    }
    for name, value in old.state_dict().items():
        fresh[name][places.get(name, ...)] = value
    vae.load_state_dict(fresh)
    return vae


class VaeStage(Stage):
    """Crops in, the same crops out.

    With latents (N, C, h, w) of all pictures in `folder`, as the encoder gives them, the encoder is frozen and the
    decoder alone learns: from the part of the whole picture's latents that lies under a crop.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        folder: Path,
        *,
        batch_size: int = 8,
        crop: int = 128,
        kl: float = 2e-5,
        latents: np.ndarray | None = None,
        features: FaceFeatures | None = None,
        critic: PatchCritic | None = None,
        adversarial: float = 0.05,
    ) -> None:
        self.vae = vae
        self.features, self.critic, self.adversarial = features, critic, adversarial
        self.folder = folder
        self.batch_size = batch_size
        self.crop = crop
        self.kl = kl
        self.latents, self.factor = latents, 2 ** (len(vae.config.block_out_channels) - 1)
        self._load()
        if latents is not None:
            vae.encoder.requires_grad_(False)
            vae.quant_conv.requires_grad_(False)
            if len(latents) != len(self.people):
                raise ValueError(f"{len(latents)} latents for {len(self.people)} pictures in {folder}")
        held = np.flatnonzero(self.people.person % VALIDATION == VALIDATION - 1)
        if not len(held):
            raise ValueError(f"{folder} holds no person n with n % {VALIDATION} == {VALIDATION - 1} to validate on")
        self.held = held[np.linspace(0, len(held) - 1, min(24, len(held))).astype(int)]
        self.held_people = self.people

    def refresh(self) -> None:
        if self.latents is None and self.world == 1:  # processes would decode new shards at the same time
            self._load()

    def _load(self) -> None:
        people = load_people(self.folder)
        self.rows = np.flatnonzero(people.person % VALIDATION != VALIDATION - 1)
        self.people = people

    def modules(self) -> dict[str, nn.Module]:
        return {"vae": self.vae} | ({} if self.critic is None else {"critic": self.critic})

    def rates(self) -> dict[str, float]:
        return {"critic": 0.5}

    def batch(self, rng: np.random.Generator) -> Batch:
        images, weights, latents, keypoints = [], [], [], []
        for _ in range(self.batch_size):
            row = int(rng.choice(self.rows))
            x, y = crop_corner(self.people, row, self.crop, rng)
            if self.latents is not None:
                x, y = x // self.factor * self.factor, y // self.factor * self.factor
            image, weight = crop_and_weight(self.people, row, x, y, self.crop)
            points = five_points(to_68(self.people.landmarks[row])) - (x, y)
            if self.latents is not None:
                side, left, top = self.crop // self.factor, x // self.factor, y // self.factor
                latents.append(self.latents[row, :, top : top + side, left : left + side])
                self._ignore_cut_sides(weight, x, y)
            elif rng.random() < 0.5:
                image, weight = image[:, ::-1], weight[:, ::-1]
                points = np.stack([self.crop - 1 - points[:, 0], points[:, 1]], 1)[[1, 0, 2, 4, 3]]
            images.append(image)
            weights.append(weight)
            keypoints.append(points)
        batch = {"images": to_tensor(np.stack(images)), "weights": torch.from_numpy(np.stack(weights)[:, None])}
        batch["keypoints"] = torch.from_numpy(np.stack(keypoints).astype(np.float32))
        return batch | ({"latents": torch.from_numpy(np.stack(latents)).float()} if latents else {})

    def _ignore_cut_sides(self, weight: np.ndarray, x: int, y: int) -> None:
        """What is decoded beside a cut lacks its neighbours, and is asked for nothing."""
        height, width = self.people.size
        rim = self.factor // 2
        weight[: rim if y > 0 else 0] = 0
        weight[self.crop - (rim if y + self.crop < height else 0) :] = 0
        weight[:, : rim if x > 0 else 0] = 0
        weight[:, self.crop - (rim if x + self.crop < width else 0) :] = 0

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        images, logs = batch["images"], {}
        if self.latents is None:
            posterior = self.vae.encode(images).latent_dist
            mean, logvar = posterior.mean, posterior.logvar.float()
            logs["kl"] = 0.5 * (mean.float().square() + logvar.exp() - 1 - logvar).mean()
            own_deviation = posterior.std
        else:
            mean, own_deviation = batch["latents"], 0
        amount = MOST_NOISE * torch.linspace(0, 1, len(mean), device=images.device).square()[:, None, None, None]
        deviation = own_deviation + amount * mean.detach().float().std((0, 2, 3), keepdim=True)
        # every process draws for all of them, and takes its part
        everyone, own = len(mean) * self.world, slice(self.rank, None, self.world)
        noise = torch.randn((everyone, *mean.shape[1:]), generator=generator, device=images.device)[own]
        decoded = self.vae.decode(mean + deviation * noise).sample.float()
        error = decoded - images
        loss = reconstruction_loss(error, batch["weights"])
        logs["psnr"] = 10 * torch.log10(4 / error.detach().square().mean())
        if "kl" in logs:
            loss = loss + self.kl * logs["kl"]
        if self.features is not None:
            logs["identity"], logs["states"] = self.features(decoded, images, batch["keypoints"].numpy())
            loss = loss + 0.3 * logs["identity"] + 0.1 * logs["states"]
        if self.critic is not None:
            seen = (batch["weights"] > 0).float()
            logs["fooled"], logs["texture"], logs["critic"] = self.critic.judge(decoded * seen, images * seen)
            loss = loss + self.adversarial * logs["fooled"] + 0.5 * logs["texture"] + logs["critic"]
        return loss, logs

    @torch.no_grad()
    def sample_sheet(self, path: Path) -> dict[str, float]:
        """Six held-out pictures over their reconstructions; the PSNR in dB of all 24, whole and around
        the eyes."""
        originals = self.held_people.images[self.held]
        device = next(self.vae.parameters()).device
        decoded = reconstruct(self.vae, originals, device)
        square = (originals.astype(np.float32) - decoded.astype(np.float32)) ** 2
        whole, eyes = [], []
        for row, error in zip(self.held, square, strict=True):
            whole.append(_psnr(error))
            (x0, y0), (x1, y1) = _box(self.held_people.landmarks[row, 36:52], 6, error.shape[:2])
            eyes.append(_psnr(error[y0:y1, x0:x1]))
        columns = np.linspace(0, len(self.held) - 1, min(6, len(self.held))).astype(int)
        sheet = np.vstack([np.hstack(originals[columns]), np.hstack(decoded[columns])])
        cv2.imwrite(str(path), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
        all_of_it = np.array([0, 0, *originals.shape[2:0:-1]])
        sharp = [
            sharpness(d, all_of_it) / max(sharpness(o, all_of_it), 1e-9)
            for d, o in zip(decoded, originals, strict=True)
        ]
        return {
            "val_psnr": float(np.mean(whole)),
            "val_psnr_eyes": float(np.mean(eyes)),
            "val_sharpness": float(np.median(sharp)),
        }


def crop_corner(people: People, row: int, crop: int, rng: np.random.Generator) -> tuple[int, int]:
    """x and y where a square crop begins, more often around the eyes and the mouth."""
    points = people.landmarks[row]
    height, width = people.size
    parts = {"eyes": points[36:52], "mouth": points[52:], "face": points}
    part = rng.choice(["eyes", "mouth", "face", "anywhere"], p=[0.35, 0.15, 0.25, 0.25])
    if part == "anywhere":
        centre = rng.uniform([0, 0], [width, height])
    else:
        centre = parts[part].mean(0) + rng.normal(0, crop / 6, 2)
    return int(np.clip(centre[0] - crop / 2, 0, width - crop)), int(np.clip(centre[1] - crop / 2, 0, height - crop))


def crop_and_weight(people: People, row: int, x: int, y: int, crop: int) -> tuple[np.ndarray, np.ndarray]:
    """A square crop of one picture, (crop, crop, 3) uint8, and the weight of its pixels, (crop, crop) float32: of
    background and clothes 1, of the head 1.5, of eyes and mouth 4."""
    points = people.landmarks[row]
    window = np.s_[y : y + crop, x : x + crop]
    labels = people.masks[row][window]
    weight = np.where((labels == BACKGROUND) | (labels == CLOTHES), 1.0, 1.5).astype(np.float32)
    for feature in (points[36:44], points[44:52], points[52:]):
        hull = cv2.convexHull(np.round(feature - (x, y)).astype(np.int32))
        cv2.fillConvexPoly(weight, hull, 4.0)
        cv2.polylines(weight, [hull], True, 4.0, thickness=5)
    return people.images[row][window].copy(), weight


def reconstruction_loss(error: Tensor, weights: Tensor) -> Tensor:
    """What is asked of decoded − image, (B, 3, H, W), with weights (B, 1, H, W).

    L1 and L2; L1 of the gradients, which asks for edges; and L1 of the error averaged over 2 × 2 and 8 ×
    8 pixels, which asks for the right colour of areas long before their texture is right.
    """
    weights = weights / weights.mean()
    across, down = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
    gradients = (across.abs() * weights[..., 1:]).mean() + (down.abs() * weights[..., 1:, :]).mean()
    fine, coarse = F.avg_pool2d(error, 2), F.avg_pool2d(error, 8)
    return (
        (error.abs() * weights).mean()
        + 0.5 * (error.square() * weights).mean()
        + 0.5 * gradients
        + 0.7 * (fine.abs() * F.avg_pool2d(weights, 2)).mean()
        + 1.5 * (coarse.abs() * (F.avg_pool2d(weights, 8) > 0)).mean()
    )


@torch.no_grad()
def latent_statistics(vae: AutoencoderKL, images: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of each latent channel over pictures (N, H, W, 3) uint8."""
    latents = torch.cat([vae.encode(to_tensor(images[i : i + 8]).to(device)).latent_dist.mean.float()
                         for i in range(0, len(images), 8)])  # fmt: skip
    return latents.mean((0, 2, 3)), latents.std((0, 2, 3))


@torch.no_grad()
def fold_normalisation(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Change the VAE so that its latents are (z − mean) / std, and decode as before.

    `quant_conv` gives mean and log-variance of z, `post_quant_conv` takes z.
    """
    channels = len(mean)
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:channels] /= std[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) / std
    before.bias[channels:] -= 2 * std.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std[None, :, None, None]


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: np.ndarray, device: torch.device) -> np.ndarray:
    """(N, H, W, 3) uint8 to the same, through the latents' means."""
    decoded = [vae.decode(vae.encode(to_tensor(images[i : i + 4]).to(device)).latent_dist.mean).sample
               for i in range(0, len(images), 4)]  # fmt: skip
    pixels = (torch.cat(decoded).float().clamp(-1, 1) + 1) * 127.5
    return pixels.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def to_tensor(images: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) in [−1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def make_trainer(stage: VaeStage, out: Path, *, lr: float, device: str, **options: Any) -> Trainer:
    """As every VAE of the mini is trained; options: of `TrainerConfig`, its end among them."""
    config = TrainerConfig(
        out, optimiser="muon", lr=lr, betas=(0.9, 0.95), weight_decay=1e-4, ema=0.995, device=device, **options
    )
    return Trainer(stage, config)


def export(trainer: Trainer, stage: VaeStage, folder: Path) -> None:
    """Save the EMA weights with normalised latents (as they are where the encoder was frozen)."""
    vae = make_vae(stage.vae.config.block_out_channels, stage.vae.config.latent_channels)
    with trainer.averaged():
        vae.load_state_dict(stage.vae.state_dict())
    if stage.latents is None:
        some = stage.rows[np.linspace(0, len(stage.rows) - 1, min(400, len(stage.rows))).astype(int)]
        fold_normalisation(vae, *latent_statistics(vae, stage.people.images[some], torch.device("cpu")))
    write_whole(folder, vae.save_pretrained)  # it may be where the stage began from


def _box(points: np.ndarray, margin: int, size: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Corners (x, y) of the box around points, inside the picture and at least a pixel large."""
    limit = np.array([size[1], size[0]])
    low = np.clip(points.min(0) - margin, 0, limit - 1).astype(int)
    high = np.clip(points.max(0) + margin, low + 1, limit).astype(int)
    return low, high


def _psnr(square: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(float(square.mean()), 1e-9)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of shards")
    parser.add_argument("--out", type=Path, required=True, help="checkpoints, log and sheet")
    parser.add_argument("--export", type=Path, help="where the VAE is saved in the end (default: OUT/vae)")
    parser.add_argument("--minutes", type=float, default=55)
    parser.add_argument("--steps", type=int, help="instead of minutes; what several processes need")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--start", type=Path, help="a saved VAE to go on from; one of fewer channels is widened")
    parser.add_argument("--features", type=Path, help="a checkpoint whose recogniser and face encoder compare faces")
    parser.add_argument("--critic", action="store_true", help="ask for texture too, by a critic that learns beside it")
    parser.add_argument(
        "--latents", type=Path, help="of all pictures in DATA (stage features writes them): the decoder alone learns"
    )
    parser.add_argument("--export-only", action="store_true", help="save the last checkpoint's VAE and end")
    args = parser.parse_args()
    if args.latents and args.start is None:
        parser.error("--latents needs --start: a decoder learns to read the latents of a given encoder")

    cv2.setNumThreads(1)
    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.start, use_safetensors=True) if args.start else make_vae()
    if vae.config.latent_channels != LATENT_CHANNELS and args.latents is None:
        vae = widened(vae, LATENT_CHANNELS)
    features = FaceFeatures.from_folder(args.features) if args.features else None
    latents = np.load(args.latents, mmap_mode="r") if args.latents else None
    critic = PatchCritic() if args.critic else None
    stage = VaeStage(
        vae, args.data, batch_size=args.batch, crop=args.crop, latents=latents, features=features, critic=critic
    )
    ends: dict[str, Any] = {"minutes": args.minutes}
    if args.steps is not None:
        ends = {"steps": args.steps, "checkpoint_every": 200, "sheet_every": 400}
    trainer = make_trainer(stage, args.out, lr=args.lr, device=args.device, seed=args.seed, log_every=20, **ends)
    if not args.export_only:
        trainer.train()
    if trainer.accelerator.is_main_process:
        export(trainer, stage, args.export or args.out / "vae")


if __name__ == "__main__":
    main()
