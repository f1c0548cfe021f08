"""Where the images of an official data set are: its files name them, and people keep them in different places.

They are looked for in the file's own folder and beside it, in `images/` and in folders named as the splits are.
"""

from pathlib import Path

from vlmq.exporter.images import is_image

FOLDERS = ("val2014", "train2014", "val2017", "train2017", "test2015", "flickr30k-images", "flickr30k_images")
Id = int | str


class ImageFinder:
    """Finds images by the names that the official sets have for them, with one listing of each likely folder."""

    def __init__(self, file: Path, subtype: str) -> None:
        self.home = file.parent / "images"
        named = ["images", *([subtype] if subtype else FOLDERS)]
        folders = [file.parent, *(near / name for near in (file.parent, file.parent.parent) for name in named)]
        self.names: dict[str, Path] = {}
        for folder in filter(Path.is_dir, folders):
            for path in filter(is_image, folder.iterdir()):
                self.names.setdefault(path.name, path)
        self.ids: dict[str, Path] = {}
        for name, path in sorted(self.names.items()):
            # COCO_val2014_000000000042.jpg, 000000000042.jpg and 42.png are all image 42.
            self.ids.setdefault(_bare(Path(name).stem.rsplit("_", 1)[-1]), path)

    def by_name(self, name: str) -> Path:
        return self.names.get(Path(name).name, self.home / name)

    def by_id(self, id_: Id) -> Path:
        """Where nothing is found, the path the image might have, for the message that it is missing."""
        return self.ids.get(_bare(str(id_)), self.home / str(id_))


def _bare(id_: str) -> str:
    return id_.lstrip("0") or "0"
