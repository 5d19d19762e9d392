"""The words of GenEval: its 80 classes in COCO's order and the benchmark's spelling, colours, relations, numbers."""

from __future__ import annotations

CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""Tasks in the order in which results are reported."""

_COCO_SPELLING = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
_OTHER_SPELLING = {
    **{coco: name for name, coco in _COCO_SPELLING.items()},
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "hair dryer": "hair drier",
}
"""What label files of detectors call some of the classes."""


def canonical(label: str) -> str | None:
    """Return GenEval's name of a detector's label; None where it is none of the 80 classes."""
    name = " ".join(label.lower().replace("_", " ").split())
    name = _OTHER_SPELLING.get(name, name)
    return name if name in CLASSES else None


def with_article(phrase: str) -> str:
    """Put "a" or "an" before a noun phrase, by its first letter."""
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def plural(noun: str) -> str:
    """Return the benchmark's plural: "es" after an s, else "s"."""
    return noun + ("es" if noun.endswith("s") else "s")
