"""The landmark predictor from pixels: is a reconstructed head better than the driver's landmarks as they
are?

Both landmark sets are detected in renders of held-out people, heads turned up to 45°. The truth is known:
that person in that pose and expression. Beside it, the predictor alone on heads whose parameters are known
exactly.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from facesnap import landmarks, metrics
from facesnap.errors import InputError
from facesnap.evaluation import protocol, report
from facesnap.evaluation.protocol import rendered
from facesnap.faces import FaceAnalyser
from facesnap.heads import Head, HeadModel, from_pretrained, rotation_from_euler
from facesnap.images import open_image
from facesnap.predictor import LandmarkPredictor
from facesnap.provenance import fingerprint
from facesnap.synthetic.people import Picture, sample_person, sample_picture

MOST_YAW = 45.0  # degrees
METHODS = ("fitted", "mean_shape", "driver_copied", "perfect_landmarks")


def run(arguments: argparse.Namespace) -> dict:
    """Errors (eye distances) of four ways to the landmarks, over `--pairs` pairs of people."""
    model, out = Path(arguments.model), Path(arguments.out)
    settings = {"what": "predictor", "model": fingerprint(model)}
    settings |= {n: getattr(arguments, n) for n in ("pairs", "seed", "size")}
    ledger, work = report.Ledger(out.with_suffix(".jsonl"), settings), out.with_suffix(".work")
    analyser = FaceAnalyser(model / "face_pack")
    predictor = LandmarkPredictor(from_pretrained(model / "head"))
    references, drivers = protocol.people(arguments.seed)
    if arguments.pairs > len(references):
        raise InputError(f"--pairs {arguments.pairs}: choose at most {len(references)}")
    for n in tqdm(range(arguments.pairs), desc="pairs", unit="pair"):
        if ledger.get(f"pair {n}") is None:
            pair = (turned_picture(references[n], 30), turned_picture(drivers[n], 31))
            ledger.put(f"pair {n}", errors(pair, n, analyser, predictor, work, arguments.size))

    rows = [ledger.rows[f"pair {n}"] for n in range(arguments.pairs)]
    measured = [row for row in rows if "fitted" in row]
    if not measured:
        raise InputError("the face pack found no face in any of the pairs, nothing can be compared")
    means = {name: float(np.mean([row[name] for row in measured])) for name in METHODS}
    known = np.array(known_parameters(predictor.model, arguments.seed))
    results = {
        "pairs": len(rows),
        "measured": len(measured),
        "errors": means,
        "fitted_to_copied": means["fitted"] / means["driver_copied"],
        "fitted_to_copied_95": metrics.interval(
            lambda i: (
                float(np.sum([measured[k]["fitted"] for k in i]))
                / float(np.sum([measured[k]["driver_copied"] for k in i]))
            ),
            np.arange(len(measured)),
        ),
        "known_parameters": {"mean": float(known.mean()), "worst": float(known.max())},
    }
    return {"settings": settings, "results": results}


def turned_picture(person: int, index: int) -> Picture:
    """A photo with a yaw drawn evenly from ±45°; the rest as the world draws it."""
    yaw = np.random.default_rng([person, index]).uniform(-MOST_YAW, MOST_YAW)
    drawn = sample_picture(sample_person(person), index, style="photo")
    p = drawn.parameters
    pose = (float(np.radians(yaw)), float(p["pitch"]), float(p["roll"]))
    return sample_picture(sample_person(person), index, style="photo", pose=pose)


def errors(
    pair: tuple[Picture, Picture],
    number: int,
    analyser: FaceAnalyser,
    predictor: LandmarkPredictor,
    work: Path,
    size: int,
) -> dict:
    """Mean landmark error of each method for one pair (reference, driver), in eye distances."""
    names = (f"reference_{number:03d}.png", f"driver_{number:03d}.png")
    try:
        faces = [
            analyser.analyse(open_image(rendered(picture, work / name, size)))
            for picture, name in zip(pair, names, strict=True)
        ]
    except InputError as error:
        return {"refused": str(error)}
    reference, driver = pair
    true_picture = protocol.truth_picture(reference.person.seed, driver)
    truth = protocol.exact_landmarks(true_picture, size)
    eyes = protocol.frontal_eye_distance(true_picture, size)
    shape, pose = (predictor.reconstruct(face)[0] for face in faces)
    # What the head model and its fit can do at best, given what a perfect landmark net would find.
    model = predictor.model
    exact = [model.fit(protocol.exact_landmarks3d(picture, size), (size, size))[0] for picture in pair]
    mean = replace(shape, identity=np.zeros_like(shape.identity))
    predicted = {
        "fitted": predictor.predict(shape, pose, (size, size)),
        "mean_shape": predictor.predict(mean, pose, (size, size)),
        "driver_copied": landmarks.from_68(faces[1].landmarks[:, :2]),
        "perfect_landmarks": predictor.predict(exact[0], exact[1], (size, size)),
    }
    return {name: metrics.landmark_error(points, truth, eyes) for name, points in predicted.items()}


def known_parameters(model: HeadModel, seed: int, count: int = 50) -> list[float]:
    """How far a known identity moves when it takes another head's pose and expression, in eye distances.

    A head of known parameters is seen in its own pose and, by the predictor, in another's; the shape is
    fitted to both pictures as to exact points (noise 1e-3 of an eye distance) and the two shapes are
    compared.
    """
    rng = np.random.default_rng([seed, 3])
    predictor, size = LandmarkPredictor(model), (256, 256)

    def draw() -> Head:
        expression = rng.normal(0, 0.5, model.num_expression) * model.expression_std
        return Head(
            identity=rng.normal(0, 1, model.num_identity) * model.identity_std,
            expression=np.abs(expression) if model.nonnegative_expression else expression,
            rotation=rotation_from_euler(rng.uniform(-MOST_YAW, MOST_YAW), *rng.uniform(-15, 15, 2)),
            scale=float(rng.uniform(60, 100)),
            translation=rng.uniform(108, 148, 2),
            size=size,
        )

    def shape(points: np.ndarray) -> np.ndarray:
        head = model.fit(points, size, noise=1e-3)[0]
        found = model.points(head.identity, np.zeros(model.num_expression))
        return (found - found.mean(axis=0)) / landmarks.eye_distance(found)

    moved = []
    for _ in range(count):
        reference, driver = draw(), draw()
        swapped = predictor.predict(reference, driver, size)
        moved.append(float(np.linalg.norm(shape(model.project(reference)) - shape(swapped), axis=-1).mean()))
    return moved


def lines(results: dict) -> list[tuple[str, object, str]]:
    """The report for the terminal: name, value, remark."""
    e, known = results["errors"], results["known_parameters"]
    low, high = results["fitted_to_copied_95"]
    return [
        ("fitted", e["fitted"], f"eye distances, {results['measured']} of {results['pairs']} pairs"),
        ("driver copied", e["driver_copied"], ""),
        ("mean shape", e["mean_shape"], ""),
        ("perfect landmarks", e["perfect_landmarks"], "the fit alone, from exact points"),
        ("fitted / copied", results["fitted_to_copied"], f"95 % {low:.3f} to {high:.3f}"),
        ("known parameters", known["mean"], f"shape moved by a pose swap; worst {known['worst']:.3f}"),
    ]
