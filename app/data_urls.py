"""Base64 and `data:` URLs as browsers read them, in pieces, so that a long text takes no more memory than its bytes.

Source: "forgiving-base64 decode" of infra.spec.whatwg.org, and the "data: URL processor" of fetch.spec.whatwg.org,
which works on what the parser of url.spec.whatwg.org leaves. Of RFC 4648 the URL-safe alphabet is read as well.
"""

import re
from binascii import a2b_base64
from collections.abc import Iterable, Iterator
from io import BytesIO

import numpy as np

from service.errors import InvalidImage

_AT_ONCE = 131_072  # characters; binascii holds the interpreter's lock, for a nanosecond each
_BLANKS = b"\t\n\f\r "
_BREAKS = b"\t\n\r"  # do not count in a URL, wherever they are
_AROUND = "".join(map(chr, range(33)))  # nor these at its ends
_KNOWN = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_=" + _BLANKS
_FOREIGN = re.compile(f"[^{re.escape(_KNOWN.decode())}]")
_ALPHABETS = re.compile("[+/]"), re.compile("[-_]")
_TO_STANDARD = bytes.maketrans(b"-_", b"+/")
# Bounded, since the search holds the interpreter's lock: no text begins with thousands of blanks.
_SCHEME = re.compile(r"[\0- ]{0,99}d[\t\n\r]{0,9}a[\t\n\r]{0,9}t[\t\n\r]{0,9}a[\t\n\r]{0,9}:", re.IGNORECASE | re.ASCII)
_ADDRESS = re.compile(r"\s{0,99}https?://", re.IGNORECASE)
_IN_BASE64 = re.compile(rb"; *base64\Z", re.IGNORECASE)
_HEADER_END = 1000  # characters before the comma of a URL, in which `;base64` is looked for
_USUAL = re.compile("data:[^,#]{0,1000};base64,", re.IGNORECASE | re.ASCII)
_DIGITS = np.full(256, 255, np.uint8)  # the values of hexadecimal digits
for _digits in (b"0123456789abcdef", b"0123456789ABCDEF"):
    _DIGITS[[*_digits]] = range(16)


class NotBase64(ValueError):
    """The text is no base64, or no `data:` URL; the message says at which character."""


def from_base64(text: str) -> bytes | InvalidImage:
    """The bytes of base64 or of a `data:` URL; or what is wrong with it."""
    usual = _USUAL.match(text)
    start, end = usual.end() if usual else 0, len(text)
    if end - start <= _AT_ONCE and not (end - start) % 4 and text.find("=", start, end - 2) < 0:
        try:  # padded and without blanks, as nearly all are
            return a2b_base64(text[start:] if start else text, strict_mode=True)
        except ValueError:
            pass
    try:
        scheme = _SCHEME.match(text)
        return _of_data_url(text, scheme.end()) if scheme else _decoded(_pieces(text, 0, end))
    except NotBase64 as error:
        hint = '; an image\'s URL goes in {"url": ...}' if _ADDRESS.match(text) else ""
        return InvalidImage(f"not valid base64, nor a data: URL of it: {error}{hint}")


def _of_data_url(text: str, start: int) -> bytes:
    """What the URL holds whose scheme ends at `start`; raises NotBase64."""
    fragment = text.find("#", start)
    comma = text.find(",", start, fragment if fragment >= 0 else len(text))
    if comma < 0:
        raise NotBase64("no comma ends the beginning of the data: URL, as in data:image/png;base64,iVBORw0...")
    header = text[max(start, comma - _HEADER_END) : comma].encode(errors="replace").translate(None, _BREAKS)
    end = fragment if fragment >= 0 else len(text.rstrip(_AROUND))
    if not _IN_BASE64.search(header.strip(_BLANKS)):
        return b"".join(_percent_decoded(text, comma + 1, end))
    if text.find("%", comma, end) >= 0:
        return _decoded(piece.decode("latin-1") for piece in _percent_decoded(text, comma + 1, end))
    return _decoded(_pieces(text, comma + 1, end))


def _pieces(text: str, start: int, end: int) -> Iterator[str]:
    return (text[low : min(low + _AT_ONCE, end)] for low in range(start, end, _AT_ONCE))


def _decoded(pieces: Iterable[str]) -> bytes:
    """The bytes of base64; raises NotBase64."""
    decoder = _Decoder()
    for piece in pieces:
        decoder.feed(piece)
    return decoder.finish()


class _Decoder:
    """Decodes base64 in chunks."""

    def __init__(self) -> None:
        # Mutable state: the bytes; the letters that are too few for more of them; how many characters, letters and
        # signs of padding there were; where the first sign of padding was, and the first letter of each alphabet.
        self._out = BytesIO()
        self._rest = b""
        self._characters = self._letters = self._padding = 0
        self._first_padding = 0
        self._first: dict[re.Pattern[str], tuple[int, str]] = {}

    def feed(self, chunk: str) -> None:
        """Decode what comes next; raises NotBase64."""
        data = chunk.encode("ascii", "replace")
        if data.translate(None, _KNOWN) and (foreign := _FOREIGN.search(chunk)):
            raise NotBase64(f"character {self._characters + foreign.start() + 1} is {foreign[0]!r}")
        self._check_alphabet(chunk)
        data = data.translate(_TO_STANDARD, _BLANKS)
        letters, sign, after = data.partition(b"=")
        if sign and not self._padding:
            self._first_padding = self._characters + chunk.index("=") + 1
        if (self._padding and letters) or after.strip(b"="):
            raise NotBase64(f"character {self._first_padding} is '=', which only ends base64, and more follows")
        self._padding += len(data) - len(letters)
        self._characters += len(chunk)
        self._letters += len(letters)
        letters = self._rest + letters
        whole = len(letters) - len(letters) % 4
        self._out.write(a2b_base64(letters[:whole]))
        self._rest = letters[whole:]

    def _check_alphabet(self, chunk: str) -> None:
        for alphabet in _ALPHABETS:
            # The search by expression is slow, and one of the two is never found.
            if alphabet not in self._first and any(each in chunk for each in alphabet.pattern[1:-1]):
                found = alphabet.search(chunk)
                assert found  # noqa: S101  as the line above says
                self._first[alphabet] = self._characters + found.start() + 1, found[0]
        if len(self._first) == len(_ALPHABETS):
            at, letter = max(self._first.values())
            raise NotBase64(f"character {at} is {letter!r}: it mixes + and / with - and _ of the URL-safe alphabet")

    def finish(self) -> bytes:
        """All bytes; raises NotBase64 where the text was cut, or its padding does not fit."""
        if self._letters % 4 == 1:
            raise NotBase64(
                f"the number of its letters, {self._letters}, is one too many, or the text was cut at its end"
            )
        if self._padding > 2 or (self._padding and (self._letters + self._padding) % 4):  # noqa: PLR2004  RFC 4648, 4
            raise NotBase64(
                f"character {self._first_padding} begins {self._padding} signs '=' after {self._letters} letters; "
                f"{-self._letters % 4} are right, or none"
            )
        if self._rest:  # 2 or 3 letters are 1 or 2 bytes, and bits that do not count
            self._out.write(a2b_base64(self._rest.ljust(4, b"A"))[: len(self._rest) - 1])
        return self._out.getvalue()


def _percent_decoded(text: str, start: int, end: int) -> Iterator[bytes]:
    """The bytes of a part of a URL."""
    rest = b""
    for piece in _pieces(text, start, end):
        data = rest + piece.encode(errors="replace").translate(None, _BREAKS)
        cut = data.rfind(b"%", -2)  # what may be half of an escape
        data, rest = (data[:cut], data[cut:]) if cut >= 0 else (data, b"")
        yield _unescaped(data)
    yield rest


def _unescaped(data: bytes) -> bytes:
    """`data` with bytes in place of escapes; a Python loop over millions of these would take seconds."""
    array = np.frombuffer(data, np.uint8)
    at = np.flatnonzero(array[:-2] == ord("%"))
    high, low = _DIGITS[array[at + 1]], _DIGITS[array[at + 2]]
    escapes = (high < 16) & (low < 16)  # noqa: PLR2004  hexadecimal digits
    at = at[escapes]
    bytes_, kept = array.copy(), np.ones(len(array), np.bool_)
    bytes_[at] = high[escapes] * 16 + low[escapes]
    kept[at + 1] = kept[at + 2] = False
    return bytes_[kept].tobytes()
