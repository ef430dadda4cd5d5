"""What OpenAPI says of the routes. Bodies are read by hand, within limits, so they are described by hand."""

from __future__ import annotations

from typing import Any

from generation import intake

_ERROR_SCHEMA = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {"field": {"type": "string", "nullable": True}, "message": {"type": "string"}, "limit": {}},
        }
    },
}


def _error(text: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": _ERROR_SCHEMA}}}


ERRORS: dict[int | str, dict[str, Any]] = {
    status: _error(text)
    for status, text in {
        413: "A body or a field is too big",
        415: "Wrong content type",
        422: "A field is wrong: which, and its limit",
        500: "This request failed",
        503: "Loading or queue full: Retry-After says when to come back",
        504: "Took too long",
    }.items()
}
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events `progress` (request_id, stage, fraction, eta_seconds, in dreamgaussian also iteration "
        "and iterations) and `end` (request_id, outcome, score, reason). Times are null until they were measured",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
    **{status: ERRORS[status] for status in (422, 503)},
}
_REPORT_HEADERS = {
    "X-Request-Id": "the request's id: as sent, or a new one",
    "X-Score": "CLIP score as the validators compute it, 0..1",
    "X-Seed": "the seed: the same prompt and seed give the same splat",
    "X-Num-Gaussians": "number of Gaussians",
    "X-Seconds": "JSON: seconds per stage",
    "X-Text-Cut": "JSON, when models read only the beginning of the prompt: tokens read, and of how many, by model",
    "X-Rejected": "why the body is empty, when it is",
}


def results(media_type: str, text: str) -> dict[int | str, dict[str, Any]]:
    headers = {
        name: {"description": meaning, "schema": {"type": "string"}} for name, meaning in _REPORT_HEADERS.items()
    }
    binary = {media_type: {"schema": {"type": "string", "format": "binary"}}}
    result = {"description": f"{text}, or an empty body", "content": binary, "headers": headers}
    return {200: result, 409: _error("A request with this X-Request-Id is in progress"), **ERRORS}


_FORM_FIELDS = {
    "prompt": {"type": "string", "minLength": 1, "maxLength": intake.MAX_PROMPT_CHARACTERS},
    "prompt_image_file": {"type": "string", "format": "binary", "description": "PNG, JPEG or WEBP; instead of prompt"},
    "seed": {"type": "integer", "minimum": 0, "maximum": intake.MAX_SEED, "description": "random when not given"},
}
_TEXT_FIELDS = {name: _FORM_FIELDS[name] for name in ("prompt", "seed")}
FORM = {
    "parameters": [
        {
            "name": "X-Request-Id",
            "in": "header",
            "description": "names the request for /events/{request_id}",
            "schema": {"type": "string", "maxLength": intake.MAX_REQUEST_ID_CHARACTERS},
        }
    ],
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": {"type": "object", "properties": _FORM_FIELDS}},
            "application/x-www-form-urlencoded": {"schema": {"type": "object", "properties": _TEXT_FIELDS}},
        },
    },
}
SCORE = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": intake.ScoreRequest.model_json_schema()}},
    }
}
