"""Which format a file is in, by its first bytes; what is not read is called by its name, with what to do instead."""

import re
from importlib.util import find_spec

from PIL import AvifImagePlugin, Image

from service.errors import InvalidImage

HEIF = find_spec("pillow_heif") is not None
FORMATS = (
    "JPEG",
    "PNG",
    "WebP",
    "GIF",
    "BMP",
    "TIFF",
    *(["AVIF"] if AvifImagePlugin.SUPPORTED else []),
    *(["HEIF"] if HEIF else []),
)
_BRANDS = 256  # bytes of a file type box that are read, 60 brands
_ITEMS = 4096  # bytes in which an image of no telling brand says how it is coded
_SURELY_ZEROS = 64  # bytes of a file in any format, of which some are zero: sizes have 2 or 4 bytes
_HEVC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}  # ISO/IEC 23008-12, annex B
_AV1 = {b"avif", b"avis"}
_OTHER_CODECS = {b"vvic": "VVC", b"evbi": "EVC", b"jpeg": "JPEG", b"j2ki": "JPEG 2000", b"avci": "H.264"}
_ANY_CODEC = {b"mif1", b"mif2", b"msf1"}
_RENDERED = "; send a rendered image such as the camera's JPEG"
_AS_JPEG = "; convert it to JPEG or PNG"
_NOT_INSTALLED = "; convert it to JPEG, or install pvt-serve[heif] where the service runs"
_AS_TEXT = (
    "an image that was sent as text, which has changed its bytes; send them as they are, with curl by --data-binary, "
    "not by --data"
)
# What may stand before the first element of a page or a drawing; nothing in it can match in two ways.
_MARKUP = rb"(?is)(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?(?:<!--(?:(?!--).)*-->\s*)*"
# Patterns of first bytes, and what such a file is. A camera's raw file that is a TIFF is told by
# `service.images.camera_raw`.
_OTHERS = (
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "JPEG XL" + _AS_JPEG),
    (rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51", "JPEG 2000" + _AS_JPEG),
    (rb"\xff\xd8\xff\xf7|\xff\xd8\xff\xf0", "JPEG-LS" + _AS_JPEG),
    (rb"(?s)....ftypcrx ", "camera raw: CR3" + _RENDERED),
    (rb"IIRO|IIRS|MMOR", "camera raw: ORF" + _RENDERED),
    (rb"IIU\x00", "camera raw: RW2" + _RENDERED),
    (rb"FOVb", "camera raw: X3F" + _RENDERED),
    (rb"\x00MRM", "camera raw: MRW" + _RENDERED),
    (rb"FUJIFILMCCD-RAW", "camera raw: RAF" + _RENDERED),
    (rb"II\x1a\x00\x00\x00HEAP", "camera raw: CRW" + _RENDERED),
    (rb"II\xbc\x01", "JPEG XR" + _AS_JPEG),
    (rb"8BPS", "Photoshop document" + _AS_JPEG),
    (rb"gimp xcf", "GIMP document" + _AS_JPEG),
    (rb"%PDF-", "PDF; render its page to JPEG or PNG"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript; render its page to JPEG or PNG"),
    (_MARKUP + rb"(?:<!doctype svg|<(?:svg:)?svg[\s>])", "SVG; render it to PNG"),
    (_MARKUP + rb"<(?:!doctype html|html|head|body|title|h1|p|div)\b", "an HTML page; send the image that it shows"),
    (
        _MARKUP + rb"(?:<\?xml|<[a-z]+[ >/:])",
        "XML; send an image, as it may be an error of the server that it came from",
    ),
    (rb"\s*(?:\{\s*[\"}]|\[\s*[\"{\d\]])", "JSON; send it with the content type application/json, or the image alone"),
    (rb"(?i)data:image/", "a data URL; send the bytes that it encodes, or send it as JSON"),
    (
        rb"/9j/[\w+/]|iVBORw0KGgo|R0lGOD[dl]h|UklGR\w",
        "base64 of an image; send the bytes that it encodes, or send it as JSON",
    ),
    (rb"(?i)https?://", "a URL; send the bytes that it leads to, or send it as JSON"),
    # Without its zeros and ends of lines; decoded as UTF-8; as Latin-1 made UTF-8; with other ends of lines.
    (rb"(?s)\x89PNG|GIF8[79]a|RIFF(?!.{4}(?:AVI |WAVE))|BM|II\*|MM\*|\xff\xd8\xff", _AS_TEXT),
    (rb"(?:\xef\xbf\xbd){3}|(?:\xef\xbf\xbd|\xc2\x89)PNG|\xc3\xbf\xc3\x98\xc3\xbf", _AS_TEXT),
    (rb"P[1-7F f]\s", "PNM" + _AS_JPEG),
    (rb"\x00\x00[\x01\x02]\x00[^\x00]|icns", "icon or cursor" + _AS_JPEG),
    (rb"\xab[\x01\x02]", "VIFF" + _AS_JPEG),
    (
        rb"(?s).\x00\x02\x00{9}|.\x01\x01.{5}\x00{4}|.\x00[\x03\x0a\x0b]\x00{9}|.{2}[\x02\x03\x0a\x0b]\x00\x00.{11}[\x08\x10\x18\x20][\x00\x08\x20\x28]",
        "TGA" + _AS_JPEG,
    ),
    (rb"(?s)\x0a[\x00\x02-\x05][\x00\x01][\x01\x02\x04\x08]|\xb1\x68\xde\x3a", "PCX" + _AS_JPEG),
    (rb"#define\s", "XBM" + _AS_JPEG),
    (rb"/\* XPM \*/", "XPM" + _AS_JPEG),
    (rb"\x01\xda[\x00\x01][\x01\x02]", "SGI image" + _AS_JPEG),
    (rb"id=ImageMagick", "MIFF" + _AS_JPEG),
    (rb"\x08\xf2\xa6\xb6|\xb6\xa6\xf2\x08", "a file of libvips" + _AS_JPEG),
    (rb"\x59\xa6\x6a\x95", "Sun raster" + _AS_JPEG),
    (rb"farbfeld", "Farbfeld" + _AS_JPEG),
    (rb"SDPX|XPDS|\x80\x2a\x5f\xd7", "DPX or Cineon" + _AS_JPEG),
    (rb"[\x8a\x8b][MJ]NG\r\n", "MNG or JNG" + _AS_JPEG),
    (rb"BLP[12]|\xabKTX|\x13\xab\xa1\x5c", "a texture" + _AS_JPEG),
    (rb"FLIF|BPG\xfb", "FLIF or BPG" + _AS_JPEG),
    (rb"AT&TFORM", "DjVu; render its page to JPEG or PNG"),
    (
        rb"\xd7\xcd\xc6\x9a|[\x01\x02]\x00\x09\x00\x00[\x01\x03]|\x01\x00\x00\x00[\x00-\xff]{36} EMF",
        "Windows metafile; render it to PNG",
    ),
    (rb"\x76\x2f\x31\x01", "OpenEXR" + _AS_JPEG),
    (rb"#\?RADIANCE|#\?RGBE", "Radiance HDR" + _AS_JPEG),
    (rb"qoif", "QOI" + _AS_JPEG),
    (rb"DDS ", "DDS" + _AS_JPEG),
    (rb"SIMPLE  =", "FITS" + _AS_JPEG),
    (rb"(?s).{128}DICM", "DICOM; send its pixels as PNG"),
    (rb"\x93NUMPY", "a NumPy file; send its pixels as PNG, or as a tensor through /v2"),
    (rb"\x89HDF\r\n|CDF[\x01\x02]|MATLAB 5", "an array file; send its pixels as PNG, or as a tensor through /v2"),
    (rb"(?s)\x5c\x01\x00\x00.{340}n[+i]1|\x00\x00\x01\x5c.{340}n[+i]1", "NIfTI; send one of its slices as PNG"),
    (rb"version https://git-lfs", "a pointer of Git LFS; fetch the file that it stands for"),
    (rb"\x1f\x8b|BZh\d|\xfd7zXZ|\x28\xb5\x2f\xfd", "a compressed file; decompress it, or name its Content-Encoding"),
    (rb"(?s)PK\x03\x04|Rar!|7z\xbc\xaf|.{257}ustar", "an archive; send the images in it one by one"),
    (
        rb"(?s)....(?:wide|moov|mdat|free).{4}|FLV\x01|\x30\x26\xb2\x75|\x00\x00\x01\xb3|OggS|\x47.{187}\x47",
        "a video; send one of its frames as JPEG or PNG",
    ),
    (rb"RIFF....WAVE|ID3", "a sound; send an image"),
    (rb"(?s)....ftyp|\x1aE\xdf\xa3|RIFF....AVI |\x00\x00\x01\xba", "a video; send one of its frames as JPEG or PNG"),
)
_OTHER_KINDS = tuple((re.compile(pattern), kind) for pattern, kind in _OTHERS)


def format_of(raw: bytes) -> str:
    """The one of `FORMATS` that the file begins as.

    Raises:
        InvalidImage: it is empty, or in another format, whose name and way out the message gives where it is known.
    """
    if not raw:
        raise InvalidImage("empty: the image has no bytes")
    if coded := _coding(raw):
        if coded not in FORMATS:
            raise InvalidImage(f"not a supported image (HEIC{_NOT_INSTALLED})" if coded == "HEIF" else _unknown())
        return coded
    for name in FORMATS[:6] if b"\0" in raw or len(raw) < _SURELY_ZEROS else ():
        _, accept = Image.OPEN[name.upper()]
        if accept and accept(raw[:16]) is True and not raw.startswith((b"\xff\xd8\xff\xf7", b"\xff\xd8\xff\xf0")):
            return name
    for pattern, kind in _OTHER_KINDS:
        if pattern.match(raw, 0, _ITEMS):
            raise InvalidImage(f"not a supported image ({kind})")
    raise InvalidImage(_unknown())


def is_known(raw: bytes) -> bool:
    """Whether the file begins as something with a name, be it read or not."""
    try:
        format_of(raw)
    except InvalidImage as error:
        return bool(raw) and str(error) != _unknown()
    return True


def _unknown() -> str:
    return f"not a supported image ({', '.join(FORMATS)})"


def _coding(raw: bytes) -> str:
    """AVIF or HEIF, for a file of still images in ISO's base media format; empty for another."""
    if raw[4:8] != b"ftyp":
        return ""
    end = min(int.from_bytes(raw[:4]), _BRANDS)
    brands = [raw[8:12], *(raw[at : at + 4] for at in range(16, end - 3, 4))]
    for brand in brands:
        if brand in _HEVC | _AV1:
            return "HEIF" if brand in _HEVC else "AVIF"
    if not _ANY_CODEC.intersection(brands):
        return ""
    if other := next((_OTHER_CODECS[brand] for brand in brands if brand in _OTHER_CODECS), ""):
        raise InvalidImage(f"not a supported image (HEIF with {other} inside{_AS_JPEG})")
    return "HEIF" if b"hvc1" in raw[:_ITEMS] else "AVIF"
