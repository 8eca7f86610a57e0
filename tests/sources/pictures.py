"""Images that programs and people wrote something into."""

import os

import datasets
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tgol_trainer.sources import load_scored_dataset

SIZE = (8, 8)
PARAMETERS = (
    "a fox, (red:1.2)\nin the snow\nNegative prompt: blurry,\nugly\nSteps: 20, Sampler: Euler a, CFG scale: 7, "
    'Seed: 18446744073709551615, Size: 8x8, Lora hashes: "one: 1f, two: 2e", Version: v1.10'
)
RATED = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:{prefix}="http://ns.adobe.com/xap/1.0/" {attribute}>{element}</rdf:Description>'
    "</rdf:RDF></x:xmpmeta>"
)


def stars(number, prefix="xmp"):
    return RATED.format(prefix=prefix, attribute=f'{prefix}:Rating="{number}"', element="")


def image(path, texts=None, **saved):
    path.parent.mkdir(parents=True, exist_ok=True)
    if texts is not None:
        saved["pnginfo"] = PngInfo()
        for name, text in texts.items():
            saved["pnginfo"].add_itxt(name, text)
    Image.new("RGB", SIZE, (len(path.name) * 7 % 255, 80, 80)).save(path, **saved)


def comment(text):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")
    return exif


def rated(number):
    exif = Image.Exif()
    exif[0x4746] = number
    return exif


def rows(folder, **options):
    dataset = load_scored_dataset(str(folder), **options)
    visual = "image" if "image" in dataset.column_names else "video"
    return {
        os.path.basename(row[visual]["path"]): row for row in dataset.cast_column(visual, datasets.Image(decode=False))
    }
