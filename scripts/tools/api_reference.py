"""Writes docs/API.md from the service's OpenAPI description: ``.venv/bin/python -m scripts.tools.api_reference``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from generation.serve_competitive import make_engine
from generation.settings import Settings
from generation.web.app import create_app
from generation.web.docs_page import about

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/API.md"
HEAD = """# The generation service's HTTP API

The service makes splats from text or images, scores splats, and reports progress. It describes itself at
`/openapi.json`, and at `/docs` as a page with forms. (This document is written from that description by
`.venv/bin/python -m scripts.tools.api_reference`.) For example:

```bash
curl -s -F prompt='a red cube' -F seed=1 -o cube.ply -D - http://127.0.0.1:10006/generate/
curl -s -F prompt_image_file=@picture.png -o picture.ply http://127.0.0.1:10006/generate/
curl -s -F prompt='a red cube' -o cube.mp4 http://127.0.0.1:10006/generate_video/
curl -sN http://127.0.0.1:10006/events
curl -s http://127.0.0.1:10006/health
curl -s -H 'Content-Type: application/json' -d @cube.json http://127.0.0.1:10006/validate_txt_to_3d_ply/
```

Splats are binary little endian PLY files with the fields of 3D Gaussian Splatting. An answer of 200 with an empty body
means that the splat was made but failed the self-check: the header `X-Rejected` says why. The last command scores a
splat: `cube.json` is `{"prompt": "a red cube", "data": "..."}`, where `data` is what `base64 -w0 cube.ply` prints.
"""
_REPORT = "X-Seed"  # a header of answers that carry a report


def render(openapi: dict[str, Any]) -> str:
    """The document, for a description as ``FastAPI.openapi()`` gives it. Answers of several routes are told once."""
    routes = [
        (f"{method.upper()} `{path}`", operation)
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    ]
    answers = [each for _, operation in routes for each in operation["responses"].items()]
    errors = {}
    for status in sorted({status for status, _ in answers if status >= "400"}):
        told = [_answer(answer) for each, answer in answers if each == status]
        errors[status] = max(told, key=told.count)
    report = next(answer["headers"] for _, answer in answers if _REPORT in answer.get("headers", {}))
    parts = [HEAD, textwrap.fill(openapi["info"]["description"], 120) + "\n"]
    for title, operation in routes:
        parts += [f"## {title}\n", " ".join(operation.get("description", "").split()) + "\n"]
        parts += _operation(operation, errors)
    parts += ["## Headers of a result\n", _table(("header", "meaning"), _headers(report))]
    parts += ["## Errors\n", "What a status means, where the route does not say otherwise.\n"]
    parts.append(_table(("status", "meaning"), errors.items()))
    return "\n".join(parts)


def _operation(operation: dict[str, Any], errors: dict[str, str]) -> Iterator[str]:
    if parameters := operation.get("parameters"):
        yield _table(("parameter", "in", "meaning"), ((f"`{p['name']}`", p["in"], about(p)) for p in parameters))
    if content := operation.get("requestBody", {}).get("content"):
        yield _table((f"field of {' or '.join(f'`{kind}`' for kind in content)}", "meaning"), _fields(content))
    answers = {status: _answer(each) for status, each in operation["responses"].items()}
    common = [status for status, told in answers.items() if errors.get(status) == told]
    rows = [(status, told) for status, told in answers.items() if status not in common]
    yield _table(("answer", "meaning"), [*rows, (", ".join(sorted(common)), "see [errors](#errors)")])


def _fields(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each field once: the forms that a body may have differ in what a field may be, or lack it."""
    forms = [
        (kind, form["properties"])
        for kind, each in content.items()
        for form in ([each["schema"]] if "properties" in each["schema"] else each["schema"]["oneOf"])
    ]
    for name in dict.fromkeys(name for _, fields in forms for name in fields):
        having = [(kind, fields[name]) for kind, fields in forms if name in fields]
        schema = dict(having[0][1])
        for key, widest in (("minimum", min), ("minLength", min), ("maximum", max), ("maxLength", max)):
            if key in schema:
                schema[key] = widest(field[key] for _, field in having)
        if "format" in schema:
            schema["format"] = " or ".join(dict.fromkeys(field["format"] for _, field in having))
        kinds = {kind for kind, _ in having}
        alone = "" if len(kinds) == len(content) else f"; in {', '.join(f'`{kind}`' for kind in kinds)} alone"
        yield f"`{name}`", about(schema) + alone


def _answer(response: dict[str, Any]) -> str:
    """A response in one cell. A report's headers are told apart, once."""
    headers = response.get("headers", {})
    if _REPORT in headers:
        return f"{response['description']}, with the [headers of a result](#headers-of-a-result)"
    return response["description"] + "".join(f"<br>{name}: {meaning}" for name, meaning in _headers(headers))


def _headers(headers: dict[str, Any]) -> list[tuple[str, str]]:
    return [(f"`{name}`", header["description"]) for name, header in headers.items()]


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    cells = ([" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows)
    lines += ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join(lines) + "\n"


def document() -> str:
    settings = Settings.resolve({"profile": "tiny"})
    return render(create_app(make_engine(settings), settings).openapi())


if __name__ == "__main__":
    DOCUMENT.write_text(document())
