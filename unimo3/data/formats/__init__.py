"""Public data sets' files -> samples, one module a format.

To add a format, write a file with ``convert(source, images, omitted)``, as in `record.Converter`, and enter it here.
"""

from unimo3.data.formats import (
    cc3m,
    coco,
    flickr30k,
    nlvr2,
    pairs,
    sbu,
    snli_ve,
    sugarcrepe,
    vg,
    vqav2,
    winoground,
)
from unimo3.data.formats.record import Converter, Sample

__all__ = ["CONVERTERS", "Converter", "Sample"]

CONVERTERS: dict[str, Converter] = {
    "cc3m": cc3m.convert,
    "coco": coco.convert,
    "flickr30k": flickr30k.convert,
    "nlvr2": nlvr2.convert,
    "pairs": pairs.convert,
    "sbu": sbu.convert,
    "snli_ve": snli_ve.convert,
    "sugarcrepe": sugarcrepe.convert,
    "vg": vg.convert,
    "vqav2": vqav2.convert,
    "winoground": winoground.convert,
}
