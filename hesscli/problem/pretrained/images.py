"""Images by class: a folder of folders, read as the model's own processor reads them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from hesscli.errors import InputError, first_line
from hesscli.problem.pretrained.examples import as_classes
from hesscli.problem.pretrained.folder import quiet, require
from hesscli.problem.pretrained.model import Pretrained, blamed_on_transformers

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
BATCH = 32
"""Images of a batch, where the user does not say."""


def load_processor(pretrained: Pretrained, *, trust: bool = False) -> Any:
    """What makes an image of any size what the model takes.

    Raises:
        InputError: there is none in the folder.
    """
    require("PIL", "a folder of images")
    from transformers import AutoImageProcessor

    folder = pretrained.folder
    with quiet(), blamed_on_transformers(f"no image processor can be read from {folder}"):
        return AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust
        )


class Images:
    """The images of a folder, each in a folder that is called after its class.

    Names that the model does not know are taken in alphabetical order where there are as many of
    them as it has classes, and that is said.

    Raises:
        InputError: there are no images, or the model does not know their classes.
    """

    def __init__(self, pretrained: Pretrained, processor: Any, folder: Path) -> None:
        self.processor, config = processor, pretrained.config
        self.mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"
        folders = sorted(place for place in folder.glob("*") if place.is_dir())
        found = {
            f: sorted(p for p in f.glob("*") if p.suffix.lower() in _SUFFIXES) for f in folders
        }
        names = [place.name for place, files in found.items() if files]
        if not names:
            got = f"{folder}, a folder without folders of images"
            raise InputError(
                "there are no images", got, "one folder a class, as in images/cat/1.png"
            )
        self.notes: tuple[str, ...] = ()
        known = {str(name) for name in config.label2id}
        if known.isdisjoint(names) and len(names) == config.num_labels:
            classes = dict(zip(names, range(len(names)), strict=True))
            order = ", ".join(f"{name} is {number}" for name, number in list(classes.items())[:3])
            self.notes = (f"classes are the folders in alphabetical order: {order}",)
        else:
            classes = dict(zip(names, as_classes(config, names, str(folder)), strict=True))
        self.files = [file for files in found.values() for file in files]
        self.labels = [classes[file.parent.name] for file in self.files]
        told = (f"{file.relative_to(folder)} {file.stat().st_size}" for file in self.files)
        self.sha256 = hashlib.sha256("\n".join(told).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """An image as the model takes it, and its class.

        Raises:
            InputError: it cannot be read.
        """
        from PIL import Image

        file = self.files[index]
        try:
            with Image.open(file) as image:
                pixels = self.processor(image.convert(self.mode), return_tensors="pt")
        except OSError as error:
            got = f"{file}: {first_line(error)}"
            raise InputError(
                "an image cannot be read", got, "copy it again, or leave it out"
            ) from None
        return {"pixel_values": pixels["pixel_values"][0], "labels": self.labels[index]}
