"""Forms as clients send them that follow older rules, or none: answered image by image, or refused with what helps."""

import base64
import binascii
from io import BytesIO
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from werkzeug.formparser import parse_form_data

from tests.app.conftest import png

HEADERS = {"Content-Type": "multipart/form-data; boundary=B"}
SEVEN = "seven.png"


def part(head: str | bytes, data: bytes) -> bytes:
    return (head if isinstance(head, bytes) else head.encode()) + b"\r\n\r\n" + data


def joined(*parts: bytes, boundary: str = "B") -> bytes:
    line = f"--{boundary}".encode()
    return b"".join(line + b"\r\n" + each + b"\r\n" for each in parts) + line + b"--\r\n"


def form(*files: tuple[str, str, bytes], boundary: str = "B") -> bytes:
    return joined(
        *(
            part(f'Content-Disposition: form-data; name="{field}"; filename="{name}"\r\nContent-Type: image/png', data)
            for field, name, data in files
        ),
        boundary=boundary,
    )


@pytest.fixture
def seven(digits: Path) -> bytes:
    return (digits / SEVEN).read_bytes()


def names(client: TestClient, body: bytes, content_type: str = HEADERS["Content-Type"]) -> list[str | None]:
    """The file name of each image, all of which must be the seven."""
    response = client.post("/predict", content=body, headers={"Content-Type": content_type})
    assert response.status_code == 200, response.text
    results = response.json()["results"]
    assert [each["predictions"][0]["label"] for each in results] == ["7"] * len(results)
    return [each["filename"] for each in results]


def refusal(client: TestClient, body: bytes, content_type: str = HEADERS["Content-Type"]) -> str:
    response = client.post("/predict", content=body, headers={"Content-Type": content_type})
    assert response.status_code == 422, response.text
    return str(response.json()["detail"])


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        ('name="image"; filename="été 数字.png"'.encode(), "été 数字.png"),
        ('name="image"; filename="été.png"'.encode("latin-1"), "été.png"),
        (b'name="image"; filename="\xff\xfe"', "ÿþ"),
        (b"name=\"image\"; filename*=UTF-8''%c3%a9t%C3%A9%20%22.png", 'été ".png'),
        (b"name=\"image\"; filename*=utf-8'fr'%C3%A9.png", "é.png"),
        (b"name=\"image\"; filename*=ISO-8859-1''%e9.png", "é.png"),
        (b'name="image"; filename="_.png"; filename*=UTF-8\'\'%C3%A9.png', "é.png"),
        (b'name="image"; filename*=UTF-8\'\'%C3%A9.png; filename="_.png"', "é.png"),
        (b"name=\"image\"; filename*=UTF-8''%ff.png", "\N{REPLACEMENT CHARACTER}.png"),
        (b"name=\"image\"; filename*=rot13''a.png", None),
        (b'name="image"; filename="a\\"b\\\\c.png"', 'a"b\\c.png'),
        (b'name="image"; filename="a%22b%0D%0A.png"', 'a"b\r\n.png'),
        (b'name="image"; filename="a;b=c.png"', "a;b=c.png"),
        (b'name="image"; filename="a;filename*=UTF-8\'\'b.png"', "a;filename*=UTF-8''b.png"),
        (b'name="image"; filename="a\\";filename*=UTF-8\'\'b.png"', "a\";filename*=UTF-8''b.png"),
        (b'name="image"; filename*="UTF-8\'\'%C3%A9.png"', "é.png"),
        (b"name=image; filename=\xe9t\xe9.png", "été.png"),
        ("name=image; filename=été.png".encode(), "été.png"),
        (b"name=image; filename=a.png", "a.png"),
        (b"NAME = image ; FileName = a.png", "a.png"),
        (b'filename="a.png"; name="image"', "a.png"),
        (b'name="image"; filename="C:\\fakepath\\a.png"', "a.png"),
        (b'name="image"; filename="../../etc/passwd"', "../../etc/passwd"),
        (b'name="image"; filename=""', ""),
        (b'name="image"', None),
    ],
)
def test_an_image_is_answered_whatever_its_file_is_called(
    client: TestClient, seven: bytes, disposition: bytes, name: str | None
) -> None:
    body = joined(part(b"Content-Disposition: form-data; " + disposition, seven))

    assert names(client, body) == [name]


def test_names_are_those_that_another_parser_reads(client: TestClient, seven: bytes) -> None:
    sent = ["a.png", "été 数字.png", "a%b.png", "a;b.png", "a'b.png", " .png", "🙂.png"]
    body = form(*(("image", name, seven) for name in sent))

    environ = {"CONTENT_TYPE": HEADERS["Content-Type"], "CONTENT_LENGTH": str(len(body)), "wsgi.input": BytesIO(body)}
    _, _, files = parse_form_data(environ)
    found = files.getlist("image")
    for each in found:
        each.close()

    assert names(client, body) == [each.filename for each in found] == sent


@pytest.mark.parametrize(
    "disposition", ["form-data", "attachment", "file", "Form-Data"]
)  # curl sends the second where it is given another Content-Type
def test_the_disposition_of_a_part_does_not_matter(client: TestClient, seven: bytes, disposition: str) -> None:
    body = joined(part(f'content-disposition: {disposition}; name="image"; filename="{SEVEN}"', seven))

    assert names(client, body) == [SEVEN]


@pytest.mark.parametrize(
    "content_type",
    ["", "image/png", *("multipart/form-data" + rest for rest in ("", "; boundary=", "; boundary=x", '; boundary="B'))],
)
@pytest.mark.parametrize("boundary", ["B", "----WebKitFormBoundary7MA4YWxkTrZu0gW", "a b", "=_" + "x" * 68])
def test_a_form_without_its_boundary_is_read_by_its_first_line(
    client: TestClient, seven: bytes, content_type: str, boundary: str
) -> None:
    body = form(("image", SEVEN, seven), ("image", "b.png", seven), boundary=boundary)

    assert names(client, body, content_type) == [SEVEN, "b.png"]


def test_what_stands_before_and_behind_a_form_is_ignored(client: TestClient, seven: bytes) -> None:
    body = form(("image", SEVEN, seven))

    assert names(client, b"This is a form.\r\n\r\n" + body) == names(client, body + b"The end\r\n--B\r\n") == [SEVEN]
    assert names(client, b"--A\r\nContent-Type: text/plain\r\n\r\n" + body) == [SEVEN]  # the header's boundary counts


@pytest.mark.parametrize(
    "head",
    ["", "Content-Type: text/html", "Content-Type: image/heic", "X-More: y", "Content-Transfer-Encoding: binary",
     "Content-Transfer-Encoding: 8BIT"],
)  # fmt: skip
def test_what_a_part_says_of_its_type_does_not_matter(client: TestClient, seven: bytes, head: str) -> None:
    crlf = "\r\n"
    body = joined(part(f'Content-Disposition: form-data; name="image"; filename="{SEVEN}"{head and crlf}{head}', seven))

    assert names(client, body) == [SEVEN]


def test_parts_in_the_codings_of_mail_are_decoded(client: TestClient, seven: bytes) -> None:
    head = f'Content-Disposition: form-data; name="image"; filename="{SEVEN}"\r\nContent-Transfer-Encoding: '
    body = joined(
        part(head + "base64", base64.encodebytes(seven).replace(b"\n", b"\r\n")),
        part(head + "Base64", base64.b64encode(seven)),
        part(head + "quoted-printable", binascii.b2a_qp(seven, quotetabs=True, istext=False)),
    )

    assert names(client, body) == [SEVEN] * 3


@pytest.mark.parametrize(
    ("head", "data", "reason"),
    [
        ("Content-Transfer-Encoding: x-uuencode", b"x", "Content-Transfer-Encoding 'x-uuencode' is not read"),
        ("Content-Transfer-Encoding: base64", b"abcde", "not valid base64"),
        (
            "Content-Type: multipart/mixed; boundary=C",
            joined(b"", boundary="C"),
            "a form within a form; send each",
        ),
    ],
)
def test_a_part_that_is_not_read_is_named_and_the_others_are_answered(
    client: TestClient, seven: bytes, head: str, data: bytes, reason: str
) -> None:
    disposition = 'Content-Disposition: form-data; name="image"; filename="a"'
    body = joined(part(disposition, seven), part(f"{disposition}\r\n{head}", data), part(disposition, seven))

    results = client.post("/predict", content=body, headers=HEADERS).json()["results"]

    assert [each.get("predictions", [{}])[0].get("label") for each in results] == ["7", None, "7"]
    assert reason in results[1]["error"]["detail"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"x.png", "text, not a file: 'x.png'; with curl put an @ before the file's name: -F image=@FILE"),
        ("été.png".encode("latin-1"), "text, not a file: '\N{REPLACEMENT CHARACTER}t\N{REPLACEMENT CHARACTER}.png'"),
        (base64.b64encode(png()), "not a supported image (base64 of an image; send the bytes that it encodes"),
        (b"data:image/png;base64," + base64.b64encode(png()), "a data URL; send the bytes that it encodes"),
        (b"https://example.org/x.png", "a URL; send the bytes that it leads to, or send it as JSON"),
        (b"", "empty: the image has no bytes"),
    ],
)
def test_a_field_that_holds_no_file_is_told_what_to_type(client: TestClient, text: bytes, reason: str) -> None:
    body = joined(part('Content-Disposition: form-data; name="image"', text))

    assert reason in refusal(client, body)


@pytest.mark.parametrize("field", ["file", "images", "image[]", "Image", "imágé", "", "x" * 2000])
def test_another_field_is_named_with_the_one_that_files_go_in(client: TestClient, seven: bytes, field: str) -> None:
    found = refusal(client, form((field, SEVEN, seven)))

    assert found == f"unknown form field {field[:100]!r}; files go in 'image': curl -F image=@FILE"


def test_a_parameter_in_a_form_is_sent_to_the_query(client: TestClient, seven: bytes) -> None:
    parameter = part('Content-Disposition: form-data; name="top_k"', b"2")

    found = refusal(
        client, joined(part('Content-Disposition: form-data; name="image"; filename="x"', seven), parameter)
    )

    assert found.endswith("; parameters go in the query: ?top_k=...")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (form(("image", SEVEN, png())).replace(b"\r\n", b"\n"), "each line of a part's head, and of a boundary"),
        (form(("image", SEVEN, png()))[:-20], "the upload was cut, or its boundary is not the one of the Content-Type"),
        (joined(part("Content-Type: image/png", png())), "without Content-Disposition, or without a name"),
        (joined(part('Content-Disposition: form-data; filename="a"', png())), "or without a name in it"),
        (joined(part("Content-Disposition: form-data; name=image" + "\r\nX-Y: z" * 8, png())), "header count"),
        (joined(part(f"Content-Disposition: form-data; name=image; filename={'x' * 5000}", png())), "header length"),
    ],
)  # fmt: skip
def test_a_broken_form_is_told_how_it_should_be(client: TestClient, body: bytes, reason: str) -> None:
    assert reason in refusal(client, body)


def test_a_form_of_no_boundary_at_all_is_told_who_writes_it(client: TestClient) -> None:
    found = refusal(client, b"x", "multipart/form-data")

    assert found.endswith("let the client library write the Content-Type, which names the boundary")
