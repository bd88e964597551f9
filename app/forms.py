"""The parts of a form (`multipart/form-data`, RFC 7578), also as clients send it that follow older rules, or none."""

import binascii
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import unquote

from multipart import MultipartError, MultipartSegment, PushMultipartParser

from service.errors import InvalidImage, InvalidRequest

# How a form begins whose boundary nobody names (RFC 2046, 5.1.1).
_BOUNDARY = re.compile(rb"--([!-~](?:[ -~]{0,198}[!-~])?)[ \t]*\r?\n(?=content-)", re.IGNORECASE)
# RFC 8187, which forms should not use and urllib3 1.x does for names that are not ASCII.
_EXTENDED_NAME = re.compile(r";\s*filename\*\s*=\s*\"?(utf-8|iso-8859-1)'[^']*'([^;\"\s]*)", re.IGNORECASE)
_UNQUOTED_NAME = re.compile(r";\s*filename\s*=\s*([^\";\s][^;]*)", re.IGNORECASE)
_QUOTED = re.compile(r"(?<!\*)=\s*\"(?:\\.|[^\"\\])*\"")  # a value in which nothing is a parameter; RFC 8187 has none
_PLAIN_CODINGS = {"", "7bit", "8bit", "binary"}
_NESTED = "multipart/"
# Words of the parser's errors, and what helps.
_ADVICE = {
    "end of multipart": "the upload was cut, or its boundary is not the one of the Content-Type",
    "line break": "each line of a part's head, and of a boundary, ends with CR LF",
    "Content-Disposition": 'each part begins with `Content-Disposition: form-data; name="image"; filename="..."`',
    "boundary": "let the client library write the Content-Type, which names the boundary",
}


class _Parser(PushMultipartParser):  # type: ignore[misc]  # untyped
    """Takes parts of any disposition: curl calls them attachments where it is given another Content-Type."""

    def _create_segment(self, headerlist: list[tuple[str, str]]) -> MultipartSegment:
        segment = MultipartSegment(headerlist)
        if segment.name is None:
            raise MultipartError("a part without Content-Disposition, or without a name in it")
        return segment


class Part(NamedTuple):
    """A part: the names of its field and its file, None if it has no file name, its data, and what that is coded in.

    `coding` is empty for plain data, else an argument of `uncoded`.
    """

    name: str
    filename: str | None
    data: bytes
    coding: str


def is_form(body: bytes) -> bool:
    """Whether `body` begins with a boundary and a part's head."""
    return body.startswith(b"--") and _BOUNDARY.match(body) is not None


def parts(body: bytes, boundary: str) -> Iterator[Part]:
    """The parts of a form, each cut out of `body` whole, its only copy.

    Where `boundary`, the one of the Content-Type, is empty or not in the body, it is the one that the body begins with.
    Names are UTF-8, or else Latin-1.

    Raises:
        InvalidRequest: the form is broken; what was cut off is not known to be whole.
    """
    delimiter = boundary.encode("latin-1", "replace")
    if not (delimiter and body.startswith(b"--" + delimiter)) and (begins := _BOUNDARY.match(body)):
        delimiter = delimiter if delimiter and b"--" + delimiter in body else begins[1]
    segment, data = MultipartSegment([]), b""
    try:
        with _Parser(delimiter, header_charset="latin-1") as parser:
            for event in parser.parse(body):
                if isinstance(event, MultipartSegment):
                    segment, data = event, b""
                elif event is not None:
                    data += event  # the first chunk, and there is no other, is not copied
                else:
                    yield _part(segment, data)
    except MultipartError as error:
        advice = next((advice for words, advice in _ADVICE.items() if words in error.args[0]), "")
        raise InvalidRequest(f"the multipart body is broken: {error.args[0]}{advice and '; '}{advice}") from error


def _part(segment: MultipartSegment, data: bytes) -> Part:
    filename, coding, content_type = segment.filename, "", segment.content_type or ""
    for header, value in segment.headerlist:
        if header == "Content-Disposition" and ("*" in value or 'filename="' not in value):
            filename = _unusual_name(_QUOTED.sub("", value)) or filename
        elif header == "Content-Transfer-Encoding" and (named := value.strip().lower()) not in _PLAIN_CODINGS:
            coding = named
    if content_type.startswith(_NESTED):
        coding = content_type
    return Part(_text(segment.name), filename and _text(filename), data, coding)


def _unusual_name(parameters: str) -> str | None:
    """The file name in `parameters`, those that are not quoted, in one of the forms that the parser does not read."""
    if extended := _EXTENDED_NAME.search(parameters):
        return unquote(extended[2], extended[1], "replace")
    unquoted = _UNQUOTED_NAME.search(parameters)
    return unquoted and unquoted[1].rstrip()


def _text(name: str) -> str:
    """A name of which each character is a byte, as text."""
    if not name.isascii():
        with suppress(UnicodeError):
            return name.encode("latin-1").decode()
    return name


def uncoded(data: bytes, coding: str) -> bytes | InvalidImage:
    """`data` without its Content-Transfer-Encoding (RFC 2045, 6), which mail libraries write into forms; or why not.

    It takes milliseconds for each megabyte.
    """
    if coding.startswith(_NESTED):
        return InvalidImage("a form within a form; send each file in a field of its own (-F image=@A -F image=@B)")
    try:
        if coding == "base64":
            return binascii.a2b_base64(data)
        if coding == "quoted-printable":
            return binascii.a2b_qp(data)
    except binascii.Error as error:
        return InvalidImage(f"not valid {coding}, which its Content-Transfer-Encoding names: {error}")
    return InvalidImage(f"Content-Transfer-Encoding {coding[:50]!r} is not read; send the file's bytes as they are")
