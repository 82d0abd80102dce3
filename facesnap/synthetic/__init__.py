"""Rendered people: a parametric head, its pictures and captions. The mini learns from them; nobody's face is used.

python -m facesnap.synthetic --out DIR --people N --per-person K --size 256 --seed S
"""

from facesnap.synthetic.captions import captions
from facesnap.synthetic.people import EVALUATION_PEOPLE, VERSION, Person, Picture, sample_person, sample_picture

__all__ = ["EVALUATION_PEOPLE", "VERSION", "Person", "Picture", "captions", "sample_person", "sample_picture"]
