"""What the service answers, over real HTTP."""

from __future__ import annotations

import base64
import contextlib
import gzip
import html
import http.client
import io
import itertools
import json
import logging
import re
import socket
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
import zstandard
from PIL import Image

from common import spz
from generation.engine.engine import TIMEOUT_S
from generation.schema.results import Request
from generation.web import intake, pictures
from generation.web.errors import ApiError
from tests.support.service_harness import PATIENCE_S, Service, hold, in_thread, serving, wait_until


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving() as service:
        yield service


def png(width: int = 8, height: int = 6, mode: str = "RGB", kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image = Image.new(mode, (width, height), 128)
    if mode in ("RGBA", "LA"):
        image.putalpha(128)
    image.save(out, kind)
    return out.getvalue()


def upload(
    service: Service, data: bytes, name: str = "a.png", kind: str = "image/png", **fields: str
) -> httpx.Response:
    return service.client.post("/generate/", files={"prompt_image_file": (name, data, kind)}, data=fields)


def error(response: httpx.Response, status: int, field: str | None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()["error"]
    assert set(body) == {"field", "message", "limit"}
    assert body["field"] == field
    assert body["message"]
    return body


@pytest.mark.parametrize("path", ["/generate/", "/generate"])
def test_a_prompt_gives_a_ply_and_its_report(service: Service, path: str) -> None:
    response = service.client.post(path, data={"prompt": "  a red cube \n", "seed": "42"})
    assert response.status_code == 200
    assert response.content == b"ply\na red cube 42"
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["X-Seed"] == "42"
    assert response.headers["X-Score"] == "0.7654"
    parts = {"iqa": 0.8, "alignment": 0.6, "ssim": 0.9, "lpips": None}
    assert json.loads(response.headers["X-Score-Parts"]) == parts
    assert response.headers["X-Num-Gaussians"] == "9000"
    assert json.loads(response.headers["X-Seconds"]) == {"text_to_image": 0.25, "dreamgaussian": 1.5}
    assert "X-Rejected" not in response.headers
    assert "X-Hopeless" not in response.headers


def test_what_no_seed_would_change_is_told(service: Service) -> None:
    assert service.generate("nothing").headers["X-Hopeless"] == "1"


def test_several_candidates_give_one_splat_and_all_scores(service: Service) -> None:
    form = {"prompt": "a red cube", "seed": "42", "candidates": " 4 ", "budget_seconds": "1e2"}
    response = service.client.post("/generate/", data=form)
    scores = json.loads(response.headers["X-Scores"])
    assert response.status_code == 200
    assert [score for _, score in scores] == [0.7654] * 4
    assert scores[0][0] == 42
    assert len({seed for seed, _ in scores}) == 4
    assert response.content == f"ply\na red cube {response.headers['X-Seed']}".encode()
    assert "X-Scores" not in service.generate(candidates=1).headers
    found = service.client.get("/metrics").text
    assert "generation_candidates_sum 4.0" in found
    assert "generation_candidates_gain_sum 0.0" in found


@pytest.mark.parametrize(
    ("field", "value"),
    [("candidates", value) for value in ("0", "65", "-1", "1.5", "two", "1e1", "\u0661")]
    + [("budget_seconds", value) for value in ("0", "0.0", "1800.1", "-1", "nan", "inf", "1e999", "1_0", "ten")],
)
def test_candidates_and_budget_have_limits(service: Service, field: str, value: str) -> None:
    refused = service.generate(**{field: value})
    assert refused.status_code == 422
    assert refused.json()["error"]["field"] == field
    assert "64" in str(refused.json()["error"]["limit"]) or "1800" in str(refused.json()["error"]["limit"])


def test_multipart_works_and_a_missing_seed_is_drawn(service: Service) -> None:
    seeds = set()
    for _ in range(3):
        response = service.client.post("/generate/", files={"prompt": (None, "ein grüner Würfel".encode())})
        assert response.content.decode().startswith("ply\nein grüner Würfel")
        seeds.add(int(response.headers["X-Seed"]))
    assert len(seeds) == 3
    assert all(0 <= seed <= 2**32 - 1 for seed in seeds)


def test_what_came_in_is_one_request_all_the_way() -> None:
    with serving() as service:
        before = time.monotonic()
        assert service.generate("a red cube", seed=42).status_code == 200
        (text,) = service.pipeline.started
        assert text.deadline is not None
        assert before < text.deadline - TIMEOUT_S < time.monotonic()
        assert replace(text, deadline=None) == Request(prompt="a red cube", seed=42, threshold=0.6)
        files, headers = {"prompt_image_file": ("a.png", png(mode="RGBA"), "image/png")}, {"X-Priority": "background"}
        assert service.client.post("/generate/", data={"seed": "7"}, files=files, headers=headers).status_code == 200
        picture = pictures.decode_image(png(mode="RGBA"), "prompt_image_file")
        assert service.pipeline.started[1] == Request(
            image=picture.image, target=picture.target, seed=7, threshold=0.6, background=True
        )


def test_a_rejected_result_is_an_empty_200_whose_reason_is_one_ascii_line(service: Service) -> None:
    response = service.generate("reject", seed=7)
    assert response.status_code == 200
    assert response.content == b""
    assert response.headers["X-Rejected"] == "CLIP score 0.21 is under 0.6 \\u2014\\nX-Evil: 1"
    assert "X-Evil" not in response.headers


def test_a_text_that_was_cut_is_told(service: Service) -> None:
    assert json.loads(service.generate("long").headers["X-Text-Cut"]) == {"mvdream": [77, 90]}
    assert "X-Text-Cut" not in service.generate("short").headers


@pytest.mark.parametrize(
    ("fields", "status", "field"),
    [
        ({"prompt": ""}, 422, "prompt"),
        ({"prompt": " \t\n "}, 422, "prompt"),
        ({"prompt": "x" * 1025}, 422, "prompt"),
        ({"prompt": "x" * 30_000}, 422, "prompt"),
        ({"prompt": "x" * 200_000}, 422, "prompt"),
        ({"prompt": "a\nb"}, 422, "prompt"),
        ({"prompt": "a\x00b"}, 422, "prompt"),
        ({"prompt": "a\x1b[31mb"}, 422, "prompt"),
        ({"prompt": "a\u2028b"}, 422, "prompt"),
        ({"prompt": "a", "seed": "-1"}, 422, "seed"),
        ({"prompt": "a", "seed": "4294967296"}, 422, "seed"),
        ({"prompt": "a", "seed": "1.5"}, 422, "seed"),
        ({"prompt": "a", "seed": "1_000"}, 422, "seed"),
        ({"prompt": "a", "seed": "\u0661"}, 422, "seed"),
        ({"prompt": "a", "steps": "5"}, 422, "steps"),
        ({"prompt": ["a", "b"]}, 422, "prompt"),
        ({"prompt_image_file": "not a file"}, 422, "prompt_image_file"),
        ({"seed": "1"}, 422, "prompt"),
    ],
)
def test_a_wrong_field_is_named(service: Service, fields: dict[str, Any], status: int, field: str) -> None:
    error(service.client.post("/generate/", data=fields), status, field)


def test_errors_say_the_limit(service: Service) -> None:
    assert error(service.generate("x" * 1025), 422, "prompt")["limit"] == 1024
    assert "4294967295" in error(service.generate("a", seed="-1"), 422, "seed")["message"]
    assert "prompt_image_file" in error(service.generate("a", steps="5"), 422, "steps")["message"]


def test_the_longest_prompt_and_both_ends_of_the_seeds_pass(service: Service) -> None:
    assert service.generate(seed=0).content == b"ply\na red cube 0"
    longest = "\U0001f680" * 1024
    assert service.generate(longest, seed=2**32 - 1).content == f"ply\n{longest} 4294967295".encode()


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/json", "application/x-www-form-urlencoded; charset=utf-16"]
)
def test_wrong_content_type(service: Service, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    error(service.client.post("/generate/", content=b"prompt=a", headers=headers), 415, "content-type")


def test_broken_multipart_is_a_400(service: Service) -> None:
    for content_type, body in (("multipart/form-data", b"x"), ("multipart/form-data; boundary=b", b"--b\r\nnonsense")):
        response = service.client.post("/generate/", content=body, headers={"content-type": content_type})
        assert error(response, 400, "body")["message"]


def form(service: Service, body: bytes) -> Any:
    return service.client.post("/generate/", content=body, headers={"content-type": "multipart/form-data; boundary=b"})


@pytest.mark.parametrize("head", ['name="prompt"', 'name="prompt_image_file"; filename="a.png"'])
@pytest.mark.parametrize("encoding", ["base64", "Quoted-Printable", "x-uuencode"])
def test_what_is_encoded_for_mail_is_no_other_prompt(service: Service, head: str, encoding: str) -> None:
    """As `curl -F 'prompt=a red cube;encoder=base64'` sends it; RFC 7578, 4.7 has no such header."""
    part = f"Content-Disposition: form-data; {head}\r\nContent-Transfer-Encoding: {encoding}\r\n\r\nYSByZWQgY3ViZQ=="
    refused = error(form(service, f"--b\r\n{part}\r\n--b--\r\n".encode()), 415, head.split('"')[1])
    assert encoding.lower() in refused["message"]


def test_a_part_that_says_it_is_not_encoded_is_read(service: Service) -> None:
    part = b'Content-Disposition: form-data; name="prompt"\r\nContent-Transfer-Encoding: 8BIT\r\n\r\na cube'
    assert form(service, b"--b\r\n" + part + b"\r\n--b--\r\n").status_code == 200


@pytest.mark.parametrize("end", ["", "\r\n--b\r\n", '\r\n--b\r\nContent-Disposition: form-data; name="seed"\r\n\r\n5'])
def test_a_form_that_is_cut_off_is_refused(service: Service, end: str) -> None:
    """Whatever part it was cut in: what is missing may be the seed, or the rest of the picture."""
    part = '--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na red cube'
    assert "closing boundary" in error(form(service, (part + end).encode()), 400, "body")["message"]


@pytest.mark.parametrize(("mode", "kind"), [("RGB", "PNG"), ("RGBA", "PNG"), ("RGB", "JPEG"), ("RGBA", "WEBP")])
def test_images_of_the_three_formats(service: Service, mode: str, kind: str) -> None:
    response = upload(service, png(mode=mode, kind=kind), kind="application/octet-stream", seed="3")
    assert response.content == f"ply\n{mode} (8, 6) 3".encode()


def test_image_modes_are_made_rgb_or_rgba(service: Service) -> None:
    assert upload(service, png(mode="L"), seed="3").content == b"ply\nRGB (8, 6) 3"
    assert upload(service, png(mode="P"), seed="3").content == b"ply\nRGB (8, 6) 3"
    assert upload(service, png(mode="LA"), seed="3").content == b"ply\nRGBA (8, 6) 3"


@pytest.mark.parametrize(("level", "shown"), [(0, 0), (256, 1), (32_768, 128), (65_535, 255)])
def test_pictures_of_16_bits_keep_their_levels(level: int, shown: int) -> None:
    out = io.BytesIO()
    Image.new("I;16", (3, 2), level).save(out, "PNG")
    assert pictures.decode_image(out.getvalue(), "picture").image.getpixel((2, 1)) == (shown,) * 3


def test_what_is_not_an_image(service: Service) -> None:
    whole = png(64, 64)
    gif = io.BytesIO()
    Image.new("RGB", (8, 8)).save(gif, "GIF")
    for data in (b"", b"hello", whole[: len(whole) // 2], gif.getvalue(), b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        error(upload(service, data), 422, "prompt_image_file")
    error(upload(service, whole, kind="text/html"), 415, "prompt_image_file")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels to speak of."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pixels = zlib.compress(bytes(1000))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(4097, 1), (1, 4097), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_image_bombs_are_refused_before_decoding(service: Service, size: tuple[int, int]) -> None:
    refused = error(upload(service, png_header(*size)), 422, "prompt_image_file")
    assert "4096" in refused["limit"]


def test_a_jpeg_that_paints_its_pixels_very_often_is_refused(service: Service) -> None:
    out = io.BytesIO()
    Image.new("L", (16, 16)).save(out, "JPEG", progressive=True)
    scan, end = out.getvalue()[out.getvalue().rindex(b"\xff\xda") : -2], out.getvalue()[-2:]

    def of(scans: int) -> bytes:
        return out.getvalue()[:-2] + (scans - 6) * scan + end  # libjpeg writes six

    assert upload(service, of(pictures.MAX_JPEG_SCANS), "a.jpg", "image/jpeg").status_code == 200
    refused = error(upload(service, of(pictures.MAX_JPEG_SCANS + 1), "a.jpg", "image/jpeg"), 422, "prompt_image_file")
    assert refused["limit"] == pictures.MAX_JPEG_SCANS


@pytest.mark.parametrize("end", [b"", b"\0", b"\xd0"])
def test_a_jpeg_of_fill_bytes_takes_no_time(end: bytes) -> None:
    """Its markers were looked for anew from each of them: with 10 MB, for days, and no other thread ran meanwhile."""
    began = time.thread_time()
    with pytest.raises(ApiError, match="not a readable image"):
        pictures.decode_image(b"\xff\xd8" + b"\xff" * 60_000 + end, "prompt_image_file")
    assert time.thread_time() - began < 3


def test_pictures_that_wait_for_their_decoder_hold_up_nothing_else(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, waiting, decode = threading.Event(), [], pictures.decode_image

    def slow(data: bytes, field: str) -> pictures.Picture:
        waiting.append(data)
        assert go.wait(PATIENCE_S)
        return decode(data, field)

    monkeypatch.setattr(pictures, "decode_image", slow)
    uploads = [in_thread(lambda: upload(service, png())) for _ in range(40)]
    wait_until(lambda: len(service.server.server_state.tasks) == 40 and len(waiting) == 2)
    body = {"prompt": "a red cube", "data": base64.b64encode(b"ply").decode()}
    assert service.client.post("/validate_txt_to_3d_ply/", json=body, timeout=20).status_code == 200
    assert len(waiting) == 2
    go.set()
    for thread, answers in uploads:
        thread.join()
        assert answers[0].status_code in (200, 503)  # the queue is short


def test_largest_image_passes_and_is_kept_smaller(service: Service) -> None:
    assert upload(service, png(4096, 4096), seed="1").content == b"ply\nRGB (2048, 2048) 1"


def test_an_image_over_10_mb_is_refused(service: Service) -> None:
    refused = error(upload(service, bytes(pictures.MAX_IMAGE_BYTES + 1)), 413, "prompt_image_file")
    assert refused["limit"] == pictures.MAX_IMAGE_BYTES


def test_a_picture_needs_no_room_on_the_disk(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    error(upload(service, bytes(pictures.MAX_IMAGE_BYTES)), 422, "prompt_image_file")


def test_bodies_are_bounded_while_they_stream(service: Service) -> None:
    refused = error(upload(service, bytes(40_000_000)), 413, "body")
    assert refused["limit"] == intake.MAX_FORM_BYTES
    head = b'--b\r\nContent-Disposition: form-data; name="prompt_image_file"; filename="a"\r\n\r\n'
    chunked = service.client.post(
        "/generate/",
        content=itertools.chain([head], (bytes(1_000_000) for _ in range(30))),
        headers={"content-type": "multipart/form-data; boundary=b"},
    )
    error(chunked, 413, "body")
    assert service.generate().status_code == 200


def connect(service: Service) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), PATIENCE_S)


def test_bodies_of_all_requests_together_are_bounded(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "MAX_HELD_BYTES", 2000)
    head = b"POST /generate/ HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n"
    prompt = "a red cube " * 80
    with connect(service) as slow:
        slow.sendall(head + b"Content-Length: 1501\r\n\r\n" + b"a" * 1500)
        wait_until(lambda: service.generate(prompt).status_code == 503)
        refused = service.generate(prompt)
        assert error(refused, 503, "body")["limit"] == 2000
        assert refused.headers["Retry-After"] == str(intake.HELD_RETRY_S)
        assert service.generate().status_code == 200
    wait_until(lambda: service.generate(prompt).status_code == 200)


def test_a_body_that_was_read_is_not_held_while_its_request_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "MAX_HELD_BYTES", 20)
    with serving(max_batch=2) as service:
        thread, held = hold(service)  # 11 bytes
        assert service.generate("another").status_code == 200
        service.pipeline.go.set()
        thread.join()
        assert held[0].status_code == 200


def test_who_sends_slowly_keeps_nobody_from_scoring(service: Service) -> None:
    head = b"POST /validate_txt_to_3d_ply/ HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with connect(service) as one, connect(service) as two, connect(service) as three:
        for slow in (one, two, three):
            slow.sendall(head + b"Content-Length: 1000\r\n\r\n{")
        began = time.monotonic()
        body = {"prompt": "a red cube", "data": base64.b64encode(b"ply").decode()}
        assert service.client.post("/validate_txt_to_3d_ply/", json=body).status_code == 200
        assert time.monotonic() - began < intake.MAX_READ_S / 2


@pytest.mark.parametrize("version", [10, 11])
@pytest.mark.parametrize(
    ("path", "headers", "status"), [("/generate/", {"X-Priority": "x"}, 422), ("/nothing", {}, 404)]
)
def test_an_answer_before_the_body_was_read_arrives(
    service: Service, path: str, headers: Any, status: int, version: int
) -> None:
    """Also where it closes the connection: urllib asks for that, and HTTP/1.0 proxies need not."""
    connection = http.client.HTTPConnection(service.url.partition("//")[2], timeout=PATIENCE_S)
    connection._http_vsn, connection._http_vsn_str = version, f"HTTP/1.{version - 10}"  # type: ignore[attr-defined]
    closing = {"Connection": "close"} if version == 11 else {"Host": "localhost"}
    with contextlib.closing(connection):
        connection.request("POST", path, bytes(9_000_000), headers | closing)
        assert connection.getresponse().status == status


def test_a_client_that_hangs_up_before_it_was_read_to_its_end_takes_nobody_with_it(service: Service) -> None:
    head = b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 9000000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), PATIENCE_S) as connection:
        connection.sendall(head + bytes(1000))
    assert httpx.get(service.url + "/health", timeout=20).is_success


def test_who_expects_to_be_asked_for_the_body_is_answered_at_once(service: Service) -> None:
    head = "POST /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += "Expect: 100-continue\r\nContent-Length: 9000000\r\n\r\n"
    with connect(service) as connection:
        connection.sendall(head.encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 404 ")


@pytest.mark.parametrize("path", ["/generate/", "/validate_txt_to_3d_ply/"])
def test_a_compressed_body_is_refused_as_such(service: Service, path: str) -> None:
    kind = "application/json" if "validate" in path else "application/x-www-form-urlencoded"
    headers = {"content-type": kind, "content-encoding": "gzip"}
    error(service.client.post(path, content=gzip.compress(b"prompt=a"), headers=headers), 415, "content-encoding")
    assert service.client.post(
        "/generate/", data={"prompt": "a cube"}, headers={"content-encoding": "identity"}
    ).is_success


def test_prompt_and_image_together_are_ambiguous(service: Service) -> None:
    error(upload(service, png(), prompt="a cube"), 422, "prompt")
    assert upload(service, png(), prompt="", seed="3").status_code == 200  # what an HTML form sends


def test_a_picture_without_a_file_name_is_one(service: Service) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="prompt_image_file"; filename=""\r\n\r\n%b\r\n'
    text = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na cube\r\n'
    headers = {"content-type": "multipart/form-data; boundary=b"}
    asked = service.client.post("/generate/", content=part % png() + b"--b--\r\n", headers=headers)
    assert asked.content.startswith(b"ply\nRGB (8, 6)")
    error(service.client.post("/generate/", content=part % png() + text + b"--b--\r\n", headers=headers), 422, "prompt")


def test_unknown_paths_and_methods_are_json_too(service: Service) -> None:
    error(service.client.get("/nothing"), 404, None)
    error(service.client.get("/generate/"), 405, None)


def test_health(service: Service) -> None:
    service.generate()
    health = service.client.get("/health").json()
    assert health["status"] == "ready"
    assert (health["profile"], health["profile_reason"], health["device"]) == ("tiny", "a test", "cpu")
    assert health["generators"] == {
        "text": {"name": "dreamgaussian", "config": "text.yaml"},
        "image": {"name": "lgm", "config": "image.yaml"},
    }
    assert health["models"][0]["licence"] == "MIT"
    assert health["score"]["formula"] == "0.7692 quality + 0.2051 alignment + 0.0256 SSIM"
    assert health["score"]["shares"]["iqa"] == pytest.approx(0.75 / 0.975)
    assert health["score"]["missing"] == {"lpips": "alexnet is not on this machine"}
    assert health["queue_depth"] == 0
    assert health["active"] == []
    assert health["totals"]["delivered"] > 0
    assert [(each["device"], each["status"], each["memory"]) for each in health["engines"]] == [("cpu", "ready", None)]
    assert health["uptime_seconds"] > 0
    assert health["version"] == service.client.get("/version/").json()


def test_the_log_has_the_alignment_and_the_whole_score(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    service.generate()
    lines = [record.getMessage() for record in caplog.records]
    assert "CLIP Score: 0.60" in lines
    assert "Score: 0.77 (quality 0.80, alignment 0.60, SSIM 0.90)" in lines


def test_openapi_describes_what_is_read_by_hand(service: Service) -> None:
    paths = service.client.get("/openapi.json").json()["paths"]
    form = paths["/generate/"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    generating = {"200", "400", "403", "408", "409", "413", "415", "421", "422", "499", "500", "503", "504"}
    assert set(paths["/generate/"]["post"]["responses"]) == generating
    assert {"403", "421", "500"} <= set.intersection(
        *(set(each["responses"]) for methods in paths.values() for each in methods.values())
    )
    answers = paths["/generate/"]["post"]["responses"]
    assert "Retry-After" in answers["503"]["headers"]
    assert "on a GPU" in answers["200"]["headers"]["X-Seed"]["description"]
    assert set(paths["/metrics"]["get"]["responses"]["200"]["content"]) == {"text/plain"}
    assert set(form) == set(intake.FORM_FIELDS)
    assert form["prompt"]["maxLength"] == 1024
    assert "video/mp4" in paths["/generate_video/"]["post"]["responses"]["200"]["content"]
    assert "503" in paths["/generate/"]["post"]["responses"]
    assert "data" in json.dumps(paths["/validate_txt_to_3d_ply/"]["post"]["requestBody"])


def test_the_docs_need_nothing_from_elsewhere(service: Service) -> None:
    page = service.client.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"://|<script|<link|@import|url\(|(src|href|action)=.?//", page.text)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    description = service.client.get("/openapi.json").json()
    for path, methods in description["paths"].items():
        assert path in page.text
        for operation in methods.values():
            assert all(html.escape(answer["description"]) in page.text for answer in operation["responses"].values())
    assert 'action="/generate/"' in page.text
    limits = ("integer; 0 to 4294967295; random", "1 to 1024 characters", "at most 1800;", "one of interactive, ")
    for words in (*limits, "<td>file; PNG"):
        assert words in page.text
    assert service.client.get("/redoc").status_code == 404


# ---- scoring ----


def score(service: Service, kind: str = "txt", **fields: Any) -> httpx.Response:
    return service.client.post(f"/validate_{kind}_to_3d_ply/", json=fields)


def packed(points: int = 2) -> bytes:
    header = struct.pack("<IIIBBBB", spz.MAGIC, 2, points, 0, 12, 0, 0)
    return zstandard.ZstdCompressor(level=1).compress(header + bytes(19 * points))


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_a_splat_is_scored_in_each_compression(service: Service) -> None:
    raw = b"ply\nwhatever"
    for compression, data in ((0, raw), (1, zstandard.compress(raw)), (2, packed())):
        response = score(service, prompt="a red cube", data=b64(data), compression=compression, future_field=1)
        assert response.status_code == 200, response.text
        body = response.json()
        assert (body["score"], body["alignment_score"], body["ssim"], body["lpips"]) == (0.8, 0.75, 0.9, 0.1)
        assert {"iqa", "preview", "grid_preview"} <= set(body)
        assert body["gates"]["finite"] == {"passed": False, "value": None, "limit": 0.0, "reason": ""}
        ply, prompt = service.pipeline.validated[-1]
        assert prompt == "a red cube"
        assert ply.startswith(b"ply\nformat binary_little_endian 1.0\nelement vertex 2\n" if compression == 2 else raw)


@pytest.mark.parametrize(("kind", "prompt"), [("txt", {"prompt": "a red cube"}), ("img", {"prompt_image": "A"})])
def test_a_splat_may_be_larger_than_any_form(service: Service, kind: str, prompt: dict[str, str]) -> None:
    """500,000 points take 9 MB and more, and 4/3 of that in base64."""
    answer = score(service, kind, **prompt, data="A" * (intake.MAX_FORM_BYTES + 1000), compression=2)
    error(answer, 422, "data" if kind == "txt" else "prompt_image")


def test_previews_are_sent_when_asked_for_and_the_score_is_above(service: Service) -> None:
    fields: dict[str, Any] = {"prompt": "a red cube", "data": b64(packed()), "compression": 2}
    both: dict[str, Any] = {"generate_grid_preview": True, "generate_single_preview": True}
    for more, shown in (
        ({}, (None, None)),
        (both, (b64(b"one"), b64(b"four"))),
        ({"generate_preview": True}, (b64(b"one"), None)),
        ({**both, "preview_score_threshold": 0.8}, (None, None)),
    ):
        body = score(service, **fields, **more).json()
        assert (body["preview"], body["grid_preview"]) == shown


def test_a_splat_is_scored_by_the_picture_that_a_validator_sees(service: Service) -> None:
    """One with four bands is put on white."""
    half = png(9, 7, "RGBA")  # red 128, of alpha 128
    assert score(service, "img", prompt_image=b64(half), data=b64(packed()), compression=2).status_code == 200
    prompt = service.pipeline.validated[-1][1]
    assert (prompt.mode, prompt.size) == ("RGB", (9, 7))
    assert prompt.getpixel((4, 3)) == pytest.approx((191, 127, 127), abs=1)


def test_the_other_prompt_may_be_null(service: Service) -> None:
    fields: dict[str, Any] = {"data": b64(packed()), "compression": 2}
    assert score(service, prompt="a red cube", prompt_image=None, **fields).status_code == 200
    assert score(service, "img", prompt=None, prompt_image=b64(png(9, 7)), **fields).status_code == 200
    error(score(service, prompt=None, prompt_image=b64(png(9, 7)), **fields), 422, "prompt")


def test_a_splat_is_scored_against_an_image(service: Service) -> None:
    response = score(service, "img", prompt_image=b64(png(9, 7)), data=b64(packed()), compression=2)
    assert response.status_code == 200, response.text
    assert service.pipeline.validated[-1][1].size == (9, 7)
    error(score(service, "img", prompt_image="", data=b64(packed()), compression=2), 422, "prompt_image")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"data": "", "prompt": ""}, "prompt"),
        ({"prompt": "a"}, "data"),
        ({"prompt": "a", "data": "?", "compression": 2}, "data"),
        ({"prompt": "a", "data": "", "compression": 2}, "data"),
        ({"prompt": "a", "data": b64(b"no"), "compression": 0}, "data"),
        ({"prompt": "a", "data": b64(packed()), "compression": 3}, "compression"),
        ({"prompt": ["a"], "data": b64(packed()), "compression": 2}, "prompt"),
    ],
)
def test_a_wrong_scoring_field_is_named(service: Service, fields: dict[str, Any], field: str) -> None:
    content = json.dumps(fields).encode()
    headers = {"content-type": "application/json"}
    error(service.client.post("/validate_txt_to_3d_ply/", content=content, headers=headers), 422, field)


@pytest.mark.parametrize("values", [b'{"x": [%s0]}' % (b"[]," * 10_001), b'{%s"x": 0}' % (b'"x":0,' * 10_001)])
def test_scoring_bodies_of_many_values_are_not_parsed(service: Service, values: bytes) -> None:
    """Values that nobody asked for cost fifty times their size in memory, and hold up all threads."""
    headers = {"content-type": "application/json"}
    refused = service.client.post("/validate_txt_to_3d_ply/", content=values, headers=headers)
    assert error(refused, 422, "body")["limit"] == intake.MAX_JSON_COMMAS


def test_scoring_bodies_that_are_no_json_objects(service: Service) -> None:
    headers = {"content-type": "application/json"}
    for content in (b"", b"{", b"\xff\xfe", b"[" * 200_000, b'{"data": "\xff"}', rb'{"data": "\ud800"}'):
        error(service.client.post("/validate_txt_to_3d_ply/", content=content, headers=headers), 400, "body")
    assert service.client.post("/validate_txt_to_3d_ply/", json=[1]).status_code == 422
    error(service.client.post("/validate_txt_to_3d_ply/", content=b"{}"), 415, "content-type")


def test_scoring_does_not_wait_for_generations(service: Service) -> None:
    service.pipeline.go.clear()
    codes: list[int] = []

    def generate() -> None:
        codes.append(httpx.post(service.url + "/generate/", data={"prompt": "hold"}, timeout=30).status_code)

    threads = [threading.Thread(target=generate) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: service.engine.active and service.engine.queue_depth == 1)
    body = {"prompt": "a", "data": b64(packed()), "compression": 2}
    assert service.client.post("/validate_txt_to_3d_ply/", json=body).json()["score"] == 0.8
    assert service.engine.active
    assert service.engine.queue_depth == 1
    service.pipeline.go.set()
    for thread in threads:
        thread.join(30)
    assert codes == [200, 200]


# ---- video ----


def test_a_rejected_video_is_empty(service: Service) -> None:
    response = service.client.post("/generate_video/", data={"prompt": "reject"})
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["X-Rejected"]


def test_turntable_is_an_mp4_that_shows_the_object_turning(monkeypatch: pytest.MonkeyPatch) -> None:
    import imageio.v3 as iio
    import torch

    from generation.splats.gaussians import Gaussians
    from generation.web import turntable

    torch.manual_seed(0)
    n = 400
    means = torch.rand(n, 3) - 0.5
    sh = torch.zeros(n, 1, 3)
    sh[means[:, 2] > 0, 0, 0] = 1.7  # the front is red, the back is blue
    sh[means[:, 2] <= 0, 0, 2] = 1.7
    quats = torch.tensor([1.0, 0, 0, 0]).repeat(n, 1)
    gaussians = Gaussians(means, quats, torch.full((n, 3), -2.8), torch.full((n,), 4.0), sh)
    frames = turntable.render(gaussians, size=64, count=8)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", "/nowhere")  # it needs no room on the disk
        mp4 = turntable.encode(frames, fps=8)
    assert mp4[4:8] == b"ftyp"
    decoded = iio.imread(mp4, extension=".mp4")
    assert decoded.shape == (8, 64, 64, 3)
    red, blue = decoded[..., 0].astype(float).mean(axis=(1, 2)), decoded[..., 2].astype(float).mean(axis=(1, 2))
    assert red[0] > blue[0] + 10
    assert blue[4] > red[4] + 10
    assert np.median(decoded[:, :4, :4]) > 240  # white around it
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: "false")
    with pytest.raises(OSError, match="ffmpeg failed with status 1"):
        turntable.encode(frames * 100, fps=8)
