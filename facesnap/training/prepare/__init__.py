"""Photographs → training shards: `python -m facesnap.training.prepare SOURCE OUT`.

SOURCE is a folder of photographs (searched below too), or WebDataset shards (a folder with `*.tar`, one such file, or
a brace pattern). OUT gets `shard-000000.tar`, … for `facesnap.training.photos`, each with a `.json` that lists its
samples, and `report.json`: how many came through, and why the others did not. One face is one sample:

    .jpg or .png   the picture: the photo around the face, longer side at most --max-side
    .mask.png      uint8 (H, W), 255 on the head with its hair, 0 elsewhere
    .crop.jpg      (224, 224, 3), `geometry.square_crop` of the face, for the CLIP-form encoder
    .worse.jpg     (224, 224, 3), the same crop with the face covered, dark or blurred
    .npz           float32: embeddings (2, 512), raw, of the picture and of its mirror image; worse_embedding (512,),
                   of what .worse.jpg shows; landmarks68 (68, 3); landmarks (72, 2); fitted (72, 2), the head model's
                   (not with --head none); box (4,); keypoints (5, 2); crop_box (3,): x0, y0 and side of the crop.
                   Pixels of the picture, x right, y down
    .json          key, identity, source, face, caption, size and original_size (height, width), score, sharpness,
                   unsteadiness, found_by, hash, worse

The samples of one identity lie next to each other, so that a reader of one shard finds another picture of the same
person for reference.

The work is tasks, the same functions on one machine and on many (`engines`): some photographs → a part (`parts`), a
part → one with the masks of a face parser and BLIP-2's captions (`looks`), the plan's line → a shard (`shards`). What
a task writes is written whole or not at all, and a task whose file is there has nothing to do: a run that was killed
goes on where it was when the same command is given again.
"""
