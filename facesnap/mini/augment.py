"""Rendered people → what the face nets train on: scenes for the detector, crops for the other two.

The nets must work on photographs too, while every training picture is a render. So nothing of a render's own
look may be relied upon: pictures are cut out and put over other backgrounds, turned, scaled, partly hidden,
lit anew, and degraded as cameras and the web degrade them (colour, grey, blur, noise, low resolution, JPEG).

Pictures are RGB uint8 (H, W, 3); points are pixels, x right, y down; z is in the same unit, towards the
camera, zero at the mean of the 68 points: the frame of InsightFace's 3D landmarks.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from insightface.utils.face_align import arcface_dst

from facesnap import landmarks as lm
from facesnap.faces import five_points
from facesnap.geometry import moved, similarity, warp
from facesnap.mini.backgrounds import Backgrounds, colour, room
from facesnap.synthetic.dataset import BACKGROUND, CLOTHES, HAIR, SKIN, Rows, load_people
from facesnap.training.prepare.worse import worse

Rng = np.random.Generator

MIRROR_68 = np.array([np.flatnonzero(lm.TO_68 == lm.MIRROR[k])[0] for k in lm.TO_68])


@dataclass(frozen=True)
class FaceSet:
    """Rendered faces, all in memory or memory-mapped, with what is known of each.

    images (N, H, W, 3) uint8; masks (N, H, W) uint8, 0 is background; points (N, 68, 3) pixels; outlines (N,
    82, 2), the 72 landmarks and the forehead, whose bounds are the face's box; keypoints (N, 5, 2); person
    (N,) running from 0; parameters (N, P) and `is_identity` (P,), true where one never changes within a
    person.
    """

    images: Rows | np.ndarray
    masks: Rows | np.ndarray
    points: np.ndarray
    outlines: np.ndarray
    keypoints: np.ndarray
    person: np.ndarray
    parameters: np.ndarray
    is_identity: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def people(self, first: int, last: int) -> np.ndarray:
        """The indices of the pictures of people first … last − 1."""
        return np.flatnonzero((self.person >= first) & (self.person < last))


def face_set(images, masks, landmarks, landmarks3d, person, parameters) -> FaceSet:
    """Derive boxes, key points and points with depth from the 72 exact landmarks in the picture (N, 72, 2)
    and in the head's frame (N, 72, 3: x right, y up, z to the camera)."""
    landmarks, landmarks3d = np.asarray(landmarks, np.float32), np.asarray(landmarks3d, np.float32)
    person = np.unique(person, return_inverse=True)[1]
    parameters = np.asarray(parameters, np.float32)
    first = np.unique(person, return_index=True)[1]
    spread = np.abs(parameters - parameters[first][person]).max(0)
    points, outlines = [], []
    for flat, head in zip(landmarks, landmarks3d, strict=True):
        right, down, centre = _camera(head, flat)
        scale = np.sqrt(np.linalg.norm(right) * np.linalg.norm(down))
        depth = head @ (-np.cross(right, down) / scale)  # right × up = towards the camera
        both = lm.to_68(np.concatenate([flat, depth[:, None]], axis=1))
        points.append(both - [0, 0, both[:, 2].mean()])
        # The forehead has no landmark: lift the brows by 0.45 of the way from brows to chin.
        brows = head[17:27]
        lift = 0.45 * (brows[:, 1].mean() - head[8, 1])
        forehead = brows + np.array([0, lift, -0.3 * lift], np.float32)
        outlines.append(np.concatenate([flat, forehead @ np.stack([right, down], 1) + centre]))
    solid = np.stack(points).astype(np.float32)
    return FaceSet(
        images=images, masks=masks, points=solid, outlines=np.stack(outlines).astype(np.float32),
        keypoints=five_points(solid), person=person, parameters=parameters, is_identity=spread < 1e-6,
    )  # fmt: skip


def box_of(outline: np.ndarray) -> np.ndarray:
    """The upright box xyxy around points (N, 2)."""
    return np.concatenate([outline.min(0), outline.max(0)])


def load(folder: Path) -> FaceSet:
    """The rendered people whose shards lie in `folder` (facesnap.synthetic.dataset)."""
    people = load_people(folder)
    return face_set(people.images, people.masks, people.landmarks, people.landmarks3d, people.person, people.parameters)


def _camera(head: np.ndarray, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The scaled-orthographic camera that took `head` (N, 3) to `flat` (N, 2): its rows, and its origin."""
    solution = np.linalg.lstsq(np.c_[head, np.ones(len(head))], flat, rcond=None)[0]
    return solution[:3, 0], solution[:3, 1], solution[3]


def around(centre, angle: float, scale: float, target) -> np.ndarray:
    """The 2 × 3 matrix that turns by `angle` (radians), scales, and takes `centre` to `target`."""
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.c_[turn, np.asarray(target) - turn @ np.asarray(centre)]


# ---------------------------------------------------------------------------------------------- appearance


def photograph(image: np.ndarray, rng: Rng, strength: float = 1.0) -> np.ndarray:
    """Another light and another camera: a random chain of changes, each left out part of the time.

    `strength` scales the changes of colour; a recogniser needs true colours more than a detector does."""
    height, width = image.shape[:2]
    # Contrast, exposure, white balance, saturation and grey are one affine map of the colours.
    matrix = np.eye(3)
    if rng.random() < 0.5:
        amount = np.clip(1 + rng.normal() * 0.35 * strength, 0, 2)
        matrix = amount * matrix + (1 - amount) / 3
    if rng.random() < 0.15 * strength:
        matrix = np.tile([0.299, 0.587, 0.114], (3, 1)) @ matrix
    gain = np.exp(rng.normal() * 0.18 * strength + rng.normal(size=3) * 0.08 * strength)
    contrast = np.exp(rng.normal() * 0.2 * strength)
    offset = gain * (1 - contrast) * cv2.mean(image)[0] + rng.normal() * 12 * strength
    matrix = np.c_[(gain * contrast)[:, None] * matrix, offset]
    x = cv2.transform(image.astype(np.float32), matrix)
    if rng.random() < 0.5 * strength:  # light from a side: a smooth field, 0.4 … 1.7
        field = np.clip(rng.normal(size=(3, 3)) * 0.28 * strength, -0.9, 0.5).astype(np.float32)
        if rng.random() < 0.3:  # coloured light
            field = field[..., None] + rng.normal(size=(3, 3, 3)).astype(np.float32) * 0.12 * strength
        field = cv2.resize(np.exp(field), (width, height), interpolation=cv2.INTER_LINEAR)
        x = cv2.multiply(x, field if field.ndim == 3 else cv2.merge([field] * 3))
    if rng.random() < 0.15:  # sharpened, as phones do
        amount = rng.uniform(0.3, 1.5)
        x = cv2.addWeighted(x, 1 + amount, cv2.GaussianBlur(x, (0, 0), rng.uniform(0.8, 2.5)), -amount, 0)
    if rng.random() < 0.2:
        x = cv2.GaussianBlur(x, (0, 0), rng.uniform(0.4, 1.0) * width / 128)
    if rng.random() < 0.2:
        factor = rng.uniform(0.3, 0.8)
        small = cv2.resize(x, None, fx=factor, fy=factor, interpolation=int(rng.integers(0, 4)))
        x = cv2.resize(small, (width, height), interpolation=int(rng.integers(1, 3)))
    if rng.random() < 0.35:
        noise = rng.standard_normal((height, width, 1 if rng.random() < 0.5 else 3), dtype=np.float32)
        x = x + noise * np.float32(rng.uniform(2, 14))
    image = cv2.convertScaleAbs(cv2.max(x, 0.0))
    if rng.random() < 0.3 * strength:
        curve = 255 * (np.arange(256) / 255) ** np.exp(rng.normal() * 0.3)
        image = cv2.LUT(image, curve.astype(np.uint8))
    if rng.random() < 0.3:
        code = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(20, 95))])[1]
        image = cv2.imdecode(code, cv2.IMREAD_COLOR)
    return image


def retexture(image: np.ndarray, labels: np.ndarray, rng: Rng) -> np.ndarray:
    """Skin and hair with other shadows, strands and highlights than the renderer's.

    `labels` (H, W) as in a mask. On smooth renders a net learns that hair is one flat colour, and takes a photograph's
    black hair, half of it highlights, for gray or fair.
    """
    height, width = image.shape[:2]
    x = image.astype(np.float32)
    for label, shadow, strands, shine in ((SKIN, 0.3, 0.08, 0.06), (HAIR, 0.3, 0.4, 0.4)):
        if rng.random() < 0.3:
            continue
        alpha = cv2.GaussianBlur((labels == label).astype(np.float32), (0, 0), max(width / 112, 0.5))
        coarse, fine = (
            cv2.resize(rng.standard_normal(cells, dtype=np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
            for cells in (rng.integers(2, 6, 2), rng.integers(5, 48, 2))  # unlike numbers of cells make strands
        )
        field = shadow * rng.uniform(0, 1) * coarse + strands * rng.uniform(0, 1) * fine
        light = 255 * shine * rng.uniform(0, 1) * np.maximum(coarse + strands / shadow * fine - 0.5, 0)
        x = x * (1 + alpha * (np.exp(field) - 1))[..., None] + (alpha * light)[..., None]
    return np.clip(x, 0, 255).astype(np.uint8)


def ruffle(image: np.ndarray, labels: np.ndarray, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    """The square picture and its labels (H, W) with all but the face pulled about by up to a twentieth of the side: a
    render's hair ends in one smooth line, a person's in tufts."""
    side = len(image)
    near = cv2.dilate((labels == SKIN).astype(np.float32), np.ones((3, 3)), iterations=max(1, side // 28))
    free = 1 - cv2.GaussianBlur(near, (0, 0), side / 56)
    move = sum(
        cv2.resize(rng.standard_normal((*cells, 2), dtype=np.float32), (side, side), interpolation=cv2.INTER_CUBIC)
        for cells in (rng.integers(3, 8, 2), rng.integers(8, 32, 2))
    )
    pull = move * (free * side * rng.uniform(0, 0.025))[..., None]
    y, x = np.indices((side, side), np.float32)
    x, y = x + pull[..., 0], y + pull[..., 1]
    return (
        cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE),
        cv2.remap(labels, x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE),
    )


def as_photograph(image: np.ndarray, labels: np.ndarray, backgrounds: Backgrounds, rng: Rng) -> np.ndarray:
    """A square render as a photograph of that person might look: other textures, clothes, background, light and
    camera, but still the person's own colours as far as a photograph keeps them."""
    if rng.random() < 0.6:
        image, labels = ruffle(image, labels, rng)
    if rng.random() < 0.8:
        image = retexture(image, labels, rng)
    if rng.random() < 0.4:  # other clothes, dark beside the neck as hair may be, folded like the first
        alpha = (labels == CLOTHES).astype(np.uint8) * 255
        cloth = backgrounds.draw(rng, len(image)).astype(np.float32) * rng.uniform(0.1, 1)
        folds = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
        folds /= max(1.0, cv2.mean(folds, alpha)[0])
        image = over(image, np.clip(cloth * folds[..., None], 0, 255).astype(np.uint8), alpha)
    if rng.random() < 0.75:
        alpha = cv2.GaussianBlur((labels != BACKGROUND).astype(np.uint8) * 255, (0, 0), len(image) / 224)
        image = over(room(backgrounds.draw(rng, len(image)), rng), image, alpha)
    if rng.random() < 0.6:  # the colour of the light: lamps are warm, shade is cool
        warmth = np.exp(rng.normal() * 0.2 * np.array([1.0, 0.1, -1.0]))
        image = np.clip(image * warmth, 0, 255).astype(np.uint8)
    return photograph(image, rng, 0.7)


def over(canvas: np.ndarray, picture: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """`picture` over `canvas`, opacity `alpha` (H, W) from 0 to 255."""
    x, y, width, height = cv2.boundingRect(alpha)
    part = np.s_[y : y + height, x : x + width]
    opacity = alpha[part].astype(np.float32) / 255
    canvas = canvas.copy()
    if width:
        canvas[part] = cv2.blendLinear(picture[part], canvas[part], opacity, 1 - opacity)
    return canvas


def poor(image: np.ndarray, landmarks: np.ndarray, name: str) -> np.ndarray:
    """The picture as a poor reference: the face behind sunglasses, or covered, dark or blurred (`prepare.worse`).

    landmarks (72, 2). Always the same for the same `name`.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if rng.random() < 0.75:
        return worse(image, box_of(landmarks), name)[0]
    image, shade = image.copy(), tuple(int(v) for v in rng.integers(5, 60, 3))
    eyes = landmarks[36:44].mean(0), landmarks[44:52].mean(0)
    apart, centre = eyes[1] - eyes[0], (eyes[0] + eyes[1]) / 2
    angle = float(np.degrees(np.arctan2(apart[1], apart[0])))
    for eye in eyes:
        middle = eye + 0.1 * (eye - centre)
        size = np.linalg.norm(apart) * rng.uniform(0.55, 0.75) * np.array([1, rng.uniform(0.6, 0.9)])
        cv2.ellipse(image, (tuple(map(float, middle)), tuple(map(float, size)), angle), shade, -1, cv2.LINE_AA)
    ends = (tuple(int(v) for v in eye) for eye in eyes)
    cv2.line(image, *ends, shade, max(1, len(image) // 100), cv2.LINE_AA)
    return image


def hide(image: np.ndarray, box: np.ndarray, rng: Rng) -> None:
    """Put something (a bar, a disc, a hand-sized blob) over a small part of the box, in place."""
    side = float(max(box[2] - box[0], box[3] - box[1]))
    centre = tuple(int(v) for v in rng.uniform(box[:2], box[2:]))
    axes = tuple(int(v) for v in side * rng.uniform(0.05, 0.22, 2) + 1)
    if rng.random() < 0.3:
        away = tuple(int(v) for v in np.array(centre) + side * rng.normal(size=2))
        cv2.line(image, centre, away, colour(rng), max(1, int(side * rng.uniform(0.02, 0.1))), cv2.LINE_AA)
    else:
        cv2.ellipse(image, centre, axes, rng.uniform(0, 180), 0, 360, colour(rng), -1, cv2.LINE_AA)


# --------------------------------------------------------------------------------------------------- views


def scene(faces: FaceSet, indices: np.ndarray, backgrounds: Backgrounds, rng: Rng, size: int, *, most: int = 6):
    """A picture with 0 … `most` faces of 9 % to 95 % of its side.

    Returns the image (size, size, 3), boxes (n, 4) and key points (n, 5, 2)."""
    canvas = backgrounds.draw(rng, size)
    count = int(rng.choice([0, 1, 2, 3, 5, 6], p=[0.15, 0.55, 0.12, 0.08, 0.06, 0.04]))
    boxes: list[np.ndarray] = []
    points: list[np.ndarray] = []
    for index in rng.choice(indices, min(count, most)):
        box, mask = box_of(faces.outlines[index]), faces.masks[index]
        largest = 0.95 if count == 1 else 0.45
        side = size * np.exp(rng.uniform(np.log(0.12 if count == 1 else 0.09), np.log(largest)))
        scale = side / max(box[2] - box[0], box[3] - box[1])
        angle = rng.normal() * (0.2 if rng.random() < 0.85 else 0.6)
        room = min(0.47 * side, size / 2)
        target = rng.uniform(room, size - room, 2)
        matrix = around((box[:2] + box[2:]) / 2, angle, scale, target)
        corners = box_of(moved(faces.outlines[index], matrix))
        if rng.random() < 0.75:
            alpha = warp((mask > 0).astype(np.uint8) * 255, matrix, size)
        else:  # with its own background, as a framed picture
            alpha = warp(np.full_like(mask, 255), matrix, size)
        if any(_covered(alpha, other) > 0.12 for other in boxes):
            continue
        picture = warp(faces.images[index], matrix, size, borderMode=cv2.BORDER_REPLICATE)
        if rng.random() < 0.3:  # a light of its own, unlike the scene's
            picture = photograph(picture, rng, 0.7)
        canvas = over(canvas, picture, alpha)
        if rng.random() < 0.2:
            hide(canvas, corners, rng)
        boxes.append(corners.astype(np.float32))
        points.append(moved(faces.keypoints[index], matrix))
    image = photograph(canvas, rng)
    empty = not boxes
    return (
        image,
        np.zeros((0, 4), np.float32) if empty else np.stack(boxes),
        np.zeros((0, 5, 2), np.float32) if empty else np.stack(points),
    )


def _covered(alpha: np.ndarray, box: np.ndarray) -> float:
    x0, y0, x1, y1 = np.clip(box, 0, alpha.shape[0]).astype(int)
    part = alpha[y0:y1, x0:x1]
    return 1.0 if part.size == 0 else float((part > 127).mean())


def landmark_view(faces: FaceSet, index: int, backgrounds: Backgrounds, rng: Rng, *, size: int = 192):
    """A crop of 1.5 × a box that is a little wrong, and the 68 points in it (68, 3) pixels of the crop."""
    points = faces.points[index]
    box = box_of(faces.outlines[index])
    side = float(max(box[2] - box[0], box[3] - box[1]))
    centre = (box[:2] + box[2:]) / 2 + rng.normal(size=2) * 0.05 * side
    angle = rng.normal() * (0.2 if rng.random() < 0.85 else 0.6)
    scale = size / (1.5 * side * np.exp(rng.uniform(-0.2, 0.25)))
    matrix = around(centre, angle, scale, (size / 2, size / 2))
    picture = warp(faces.images[index], matrix, size)
    as_rendered = rng.random() < 0.4  # of what the net sees in use, most is like this
    if not as_rendered and rng.random() < 0.6:
        alpha = warp((faces.masks[index] > 0).astype(np.uint8) * 255, matrix, size)
        picture = over(backgrounds.draw(rng, size), picture, alpha)
    points = moved(points, matrix)
    if not as_rendered and rng.random() < 0.2:
        hide(picture, box_of(points[:, :2]), rng)
    if rng.random() < 0.5:
        picture = picture[:, ::-1]
        points = points[MIRROR_68] * [-1, 1, 1] + [size - 1, 0, 0]
    picture = np.ascontiguousarray(picture)
    return picture if as_rendered else photograph(picture, rng), points.astype(np.float32)


def aligned_view(
    faces: FaceSet, index: int, rng: Rng, *, jitter: float = 0.06, backgrounds: Backgrounds | None = None
) -> np.ndarray:
    """InsightFace's 112 × 112 crop, from key points as wrong as a detector's (`jitter` of the eye distance).

    With `backgrounds` most are made to look like photographs.
    """
    points = faces.keypoints[index]
    distance = np.linalg.norm(points[0] - points[1]) + 1e-6
    shared, each = rng.normal(size=(1, 2)) * 0.5, rng.normal(size=(5, 2))
    points = points + max(distance, 0.3 * np.ptp(points[:, 1])) * jitter * (shared + each)
    matrix = similarity(points, arcface_dst)
    crop = warp(faces.images[index], matrix, 112)
    if jitter == 0:
        return crop
    if backgrounds is not None and rng.random() < 0.7:
        labels = cv2.warpAffine(faces.masks[index], matrix, (112, 112), flags=cv2.INTER_NEAREST)
        return as_photograph(crop, labels, backgrounds, rng)
    return photograph(crop, rng, 0.35)
