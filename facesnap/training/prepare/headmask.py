"""The region of a head with its hair, the M of equation 3: by a face-parsing model, or from landmarks alone.

Masks are uint8 (H, W), 255 on the head and 0 elsewhere; pictures RGB uint8 (H, W, 3).
"""

from typing import Any

import cv2
import numpy as np

from facesnap.geometry import warp

# The skull with short hair: an ellipsoid in the frame of the face (x to the picture's right, y from chin to brows, z
# out of the face), which begins at the nasion; lengths are distances from nasion to chin. Fitted to rendered heads.
CENTRE, RADII = (0.0, 0.15, -0.8), (0.8, 1.03, 0.75)
LEAN = 0.1  # radians by which the skull leans back from the line of chin and brows
JAW = 0.04  # how far the outline of the jaw is pushed out, in the same unit

# How GrabCut is asked, in the same unit. Measured on the 50 rendered heads without hats that the skull was
# fitted to: the hull alone overlaps the true mask by 0.81 (intersection over union), refined by 0.93.
GRID = 128  # pixels of the longer side of what it sees: 0.1 s a face
CORE, REACH = 0.2, 0.45  # hair from this deep inside the hull is sure; none lies farther outside than this
FALL, NECK = 0.6, 0.45  # how far below the chin hair is looked for; half the width of the neck, where it is not

# Names of face-parsing labels that are head or hair, as in CelebAMask-HQ and its like. Glasses lie over the eyes and
# count; hats, earrings, necks and clothes belong to the prompt.
HEAD_LABELS = frozenset(
    "skin face nose eye_g eyeglass eyeglasses glasses l_eye r_eye left_eye right_eye l_brow r_brow left_brow "
    "right_brow l_ear r_ear left_ear right_ear mouth inner_mouth u_lip l_lip upper_lip lower_lip hair beard".split()
)
PARSE_SIDE, PARSE_SCALE = 512, 2.2  # CelebA-HQ's framing, on which these models are trained, in boxes


def landmark_mask(landmarks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """iBUG-68 in 3D (68, 3), pixels, z towards the camera → the head (H, W) in a picture of `size` (H, W).

    The convex hull of the landmarks, the jaw a little enlarged, and of a skull with short hair, turned as the face
    is. Hair that falls lower is not in it: `grab_hair` adds it.
    """
    points = landmarks.astype(np.float64) * [1, -1, 1]  # y up
    nasion, chin = points[27], points[8]
    unit = np.linalg.norm(nasion - chin)
    x = (points[[16, 26, 45, 42, 35]] - points[[0, 17, 36, 39, 31]]).sum(0)
    x /= np.linalg.norm(x)
    y = points[17:27].mean(0) - chin
    y -= (y @ x) * x
    y /= np.linalg.norm(y)
    z = np.cross(x, y)
    axes = np.stack([x, np.cos(LEAN) * y - np.sin(LEAN) * z, np.cos(LEAN) * z + np.sin(LEAN) * y])
    centre = nasion + unit * np.array(CENTRE) @ axes
    # An ellipsoid of half axes h (3, 3) is seen as the ellipse L u, |u| ≤ 1, with L Lᵀ = hᵀ h in x and y.
    half = unit * np.array(RADII)[:, None] * axes[:, :2]
    angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    skull = centre[:2] + np.stack([np.cos(angle), np.sin(angle)], 1) @ np.linalg.cholesky(half.T @ half).T
    away = points[:17, :2] - points[27:36, :2].mean(0)
    jaw = points[:17, :2] + JAW * unit * away / np.linalg.norm(away, axis=1, keepdims=True)
    return _filled(np.concatenate([skull, jaw, points[:, :2]]) * [1, -1], size)


def grab_hair(image: np.ndarray, landmarks: np.ndarray, hull: np.ndarray) -> np.ndarray:
    """The mask (H, W) of `landmark_mask` (`hull`), its edge moved to where the colours change.

    GrabCut (Rother et al. 2004): the landmarks and the depth of the hull are head for sure; the neck, what is far
    away and what lies outside the picture are not; colours decide between.
    """
    flat = landmarks[:, :2].astype(np.float64)
    up = flat[17:27].mean(0) - flat[8]
    up /= np.linalg.norm(up)
    unit = np.linalg.norm(landmarks[27] - landmarks[8])
    x, y, width, height = cv2.boundingRect(hull)
    border = (REACH + 0.15) * unit
    scale = GRID / (max(width, height) + 2 * border)
    matrix = np.array([[scale, 0, -scale * (x - border)], [0, scale, -scale * (y - border)]])
    size = (round(scale * (width + 2 * border)), round(scale * (height + 2 * border)))

    small = warp(image, matrix, size[::-1], borderMode=cv2.BORDER_REPLICATE)
    within = cv2.warpAffine(np.full(hull.shape, 255, np.uint8), matrix, size) > 127
    head = (cv2.warpAffine(hull, matrix, size) > 127).astype(np.uint8)
    points = flat @ matrix[:, :2].T + matrix[:, 2]
    face = _filled(points, size[::-1]) > 0
    outside = cv2.distanceTransform(1 - head, cv2.DIST_L2, 5) / (scale * unit)
    inside = cv2.distanceTransform(head, cv2.DIST_L2, 5) / (scale * unit)
    below = (np.stack(np.meshgrid(*map(np.arange, size)), -1) - points[8]) / (scale * unit)
    above, aside = below @ up, np.abs(below @ [-up[1], up[0]])
    # A turned face has no hair in front of it, below the brows.
    turn = (landmarks[16, 2] - landmarks[0, 2]) / np.linalg.norm(landmarks[16] - landmarks[0])  # of the sine
    ahead = (np.stack(np.meshgrid(*map(np.arange, size)), -1) - points[27]) @ [-up[1], up[0]] * -np.sign(turn)
    ahead = (ahead > 0) & (above < (points[17:27].mean(0) - points[8]) @ up / (scale * unit)) & (abs(turn) > 0.35)

    labels = np.where(head, cv2.GC_PR_FGD, np.where(outside < REACH, cv2.GC_PR_BGD, cv2.GC_BGD)).astype(np.uint8)
    labels[(head == 0) & ((above < -FALL) | ((above < 0) & (aside < NECK)))] = cv2.GC_BGD
    labels[ahead] = cv2.GC_BGD
    labels[face | ((inside > CORE) & ~ahead)] = cv2.GC_FGD
    labels[~within] = cv2.GC_BGD
    if (labels == cv2.GC_FGD).any() and (labels != cv2.GC_FGD).any():  # else there is nothing to tell apart
        cv2.setRNGSeed(0)  # its clusters begin at random
        cv2.grabCut(small, labels, None, np.zeros((1, 65)), np.zeros((1, 65)), 2, cv2.GC_INIT_WITH_MASK)
    found = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)
    found = cv2.morphologyEx(found, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)) | face
    found = cv2.morphologyEx(_with(found, face), cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (7, 7)))
    contours, _ = cv2.findContours(found, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(found, contours, -1, 1, cv2.FILLED)  # no holes
    whole = cv2.warpAffine(found * 255, matrix, hull.shape[::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    return np.where(whole > 127, 255, 0).astype(np.uint8)


class FaceParser:
    """A semantic segmentation model of transformers that knows the parts of a face, such as a SegFormer trained on
    CelebAMask-HQ (`jonathandinu/face-parsing` on the Hub); `model` is its folder or its id.

    Which labels are head is read off their names in the model's configuration."""

    def __init__(self, model: str, device: str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

        self.model = AutoModelForSemanticSegmentation.from_pretrained(model, use_safetensors=True).to(device).eval()
        self.processor = AutoImageProcessor.from_pretrained(model, backend="pil")  # the other needs torchvision
        names = {int(i): str(n).lower().removesuffix(".png") for i, n in self.model.config.id2label.items()}
        self.labels = [i for i, name in names.items() if name in HEAD_LABELS]
        if not {"skin", "face"} & set(names.values()) or "hair" not in names.values():
            known = ", ".join(names.values())
            raise ValueError(f"{model!r} has no labels for skin and hair (it has {known}): give a face-parsing model")

    def mask(self, image: np.ndarray, box: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        """The head (H, W) whose face has this box (4,) and these landmarks (68, 2+); others in the picture are not
        in it, unless their hair touches."""
        import torch

        side = PARSE_SCALE * float(max(box[2:] - box[:2]))
        corner = (box[:2] + box[2:]) / 2 - [side / 2, 0.55 * side]  # a little up, for the hair
        scale = PARSE_SIDE / side
        matrix = np.array([[scale, 0, -scale * corner[0]], [0, scale, -scale * corner[1]]])
        crop = warp(image, matrix, PARSE_SIDE, borderMode=cv2.BORDER_REPLICATE)
        inputs: Any = self.processor(images=crop, return_tensors="pt").to(self.model.device)
        with torch.inference_mode():
            logits = self.model(**inputs).logits
            logits = torch.nn.functional.interpolate(logits, (PARSE_SIDE, PARSE_SIDE), mode="bilinear")
            labels = logits[0].argmax(0).cpu().numpy()
        head = np.isin(labels, self.labels).astype(np.uint8)
        points = landmarks[:, :2] @ matrix[:, :2].T + matrix[:, 2]
        head = _with(head, _filled(points, (PARSE_SIDE, PARSE_SIDE)) > 0)
        whole = cv2.warpAffine(head * 255, matrix, image.shape[1::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
        return np.where(whole > 127, 255, 0).astype(np.uint8)


def _filled(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The convex hull of points (N, 2), filled with 255 in a canvas of `size` (H, W)."""
    mask = np.zeros(size, np.uint8)
    hull = cv2.convexHull(points.astype(np.float32))
    cv2.fillPoly(mask, [np.round(hull * 16).astype(np.int32)], (255,), cv2.LINE_8, 4)  # sixteenths of a pixel
    return mask


def _with(mask: np.ndarray, face: np.ndarray) -> np.ndarray:
    """Of a mask (H, W) of 0 and 1, the connected part that has most of the face (H, W) in it."""
    count, parts = cv2.connectedComponents(mask)
    votes = np.bincount(parts[face & (mask > 0)], minlength=count)
    return (parts == votes.argmax()).astype(np.uint8) if votes.sum() else np.zeros_like(mask)
