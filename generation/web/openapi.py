"""What OpenAPI says of the routes. Bodies are read by hand, within limits, so they are described by hand."""

from __future__ import annotations

from typing import Any

from generation.web import intake, pictures

ABOUT = (
    "Errors are JSON: which field, what is wrong, and the limit. An unknown path is answered with 404, an unknown "
    "method with 405, an unknown Host with 421, and a request that another website makes in a browser with 403."
)

_ERROR_SCHEMA = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {"field": {"type": ["string", "null"]}, "message": {"type": "string"}, "limit": {}},
            "required": ["field", "message", "limit"],
        }
    },
    "required": ["error"],
}
_TEXT = {"type": "string"}
_EVENT = {  # one event of a stream
    "type": "object",
    "properties": {
        "event": {"type": "string", "enum": ["progress", "end"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
    "required": ["event", "data"],
}
_ID = {"X-Request-Id": {"description": "the request's id, if it has one", "schema": _TEXT}}
_RETRY = {"Retry-After": {"description": "seconds; absent where waiting does not help", "schema": _TEXT}}


def _error(text: str, headers: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": _ERROR_SCHEMA}}, "headers": headers or {}}


#: Responses that every route may have.
COMMON: dict[int | str, dict[str, Any]] = {
    403: _error("The request comes from another website (`Origin`, `Sec-Fetch-Site`)"),
    421: _error("`Host` is neither a loopback name nor one of --allowed-hosts"),
    500: _error("This request failed", _ID),
}
_READING: dict[int | str, dict[str, Any]] = {
    400: _error("The body does not parse as its content type, or is cut off", _ID),
    408: _error(f"The body took longer than {intake.MAX_READ_S:.0f} s", _ID),
    413: _error("The body or a field is too large", _ID),
    415: _error("Wrong content type, an encoded body, or a part of a form with an encoding that is not read", _ID),
    422: _error("A field is invalid: which one, and its limit", _ID),
    499: {"description": "The client closed the connection"},
    503: _error("Loading, queue full, too many uploads at once, or no engine works", {**_ID, **_RETRY}),
    504: _error("The request took too long", _ID),
}
ERRORS: dict[int | str, dict[str, Any]] = {**COMMON, **_READING}
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events `progress` (request_id, priority, stage, fraction, eta_seconds) and `end` (request_id, "
        "outcome, score, reason). The generator's stage has its name, such as `dreamgaussian`; the stage is `paused` "
        "while other requests go first, and `candidates` once the first of several candidates is done. `eta_seconds` "
        "is null until a request of its kind has been measured",
        "content": {"text/event-stream": {"schema": _EVENT}},
    },
    422: _error("Not a valid request id"),
    503: _error("Too many listeners, or the service is shutting down", _RETRY),
    **COMMON,
}
SCORES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "JSON: `score` (final; as validators', it may be over 1), its parts `alignment_score`, `ssim`, "
        "`iqa` (quality) and `lpips`, of which the last two are null if their weights are missing, the requested "
        "previews in base64, and `gates`. All scores are 0 if a gate fails"
    },
    **ERRORS,
}
METRICS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Prometheus text format", "content": {"text/plain": {"schema": _TEXT}}},
    **COMMON,
}
_REPORT_HEADERS = {
    "X-Request-Id": "the request's id: as sent, or a new one",
    "X-Score": "the final score, 0..1, computed as validators do; it is compared with the threshold",
    "X-Score-Parts": "JSON: its parts alignment, iqa (quality), ssim, lpips; null for a part whose weights are missing",
    "X-Seed": "the seed; on a CPU it gives the same splat again, on a GPU up to rounding",
    "X-Scores": "JSON, with several candidates: [seed, score] of each that was finished, the request's own seed "
    "first; null for a score that was not measured",
    "X-Num-Gaussians": "number of Gaussians",
    "X-Seconds": "JSON: seconds per stage",
    "X-Text-Cut": "JSON, when a model reads only the beginning of the prompt: tokens read and tokens in all, by model",
    "X-Rejected": "why the body is empty, if it is",
    "X-Hopeless": "1 when no other seed would help, as with a blank picture",
}


def results(media_type: str, text: str) -> dict[int | str, dict[str, Any]]:
    """The responses of a route that returns a splat or a video."""
    headers = {name: {"description": meaning, "schema": _TEXT} for name, meaning in _REPORT_HEADERS.items()}
    binary = {media_type: {"schema": {"type": "string", "format": "binary"}}}
    result = {"description": f"{text}, or an empty body", "content": binary, "headers": headers}
    return {200: result, 409: _error("A request with this X-Request-Id is in progress", _ID), **ERRORS}


_CONTROLS = r"\u0000-\u001f\u007f-\u009f\u2028\u2029"
REQUEST_ID = {"pattern": rf"^[A-Za-z0-9._-]{{1,{intake.MAX_REQUEST_ID_CHARACTERS}}}$"}
_PROMPT = {
    "type": "string",
    "minLength": 1,
    "maxLength": intake.MAX_PROMPT_CHARACTERS,
    "pattern": rf"^[^\s{_CONTROLS}]([^{_CONTROLS}]*[^\s{_CONTROLS}])?$",
    "description": "no control characters; leading and trailing white space does not count",
}
_PICTURE = {"type": "string", "format": "binary", "description": "PNG, JPEG or WEBP; instead of prompt"}
_SEED = {"type": "integer", "minimum": 0, "maximum": intake.MAX_SEED, "description": "random when not given"}
_CANDIDATES = {
    "type": "integer",
    "minimum": 1,
    "maximum": intake.MAX_CANDIDATES,
    "default": 1,
    "description": "how many splats to make, with other seeds, as far as other requests leave room; the one with the "
    "highest X-Score is returned",
}
_BUDGET = {
    "type": "number",
    "exclusiveMinimum": 0,
    "maximum": intake.MAX_BUDGET_S,
    "description": "with several candidates: after this time the best so far is returned, or else the first to finish",
}


_MORE_FIELDS = {"seed": _SEED, "candidates": _CANDIDATES, "budget_seconds": _BUDGET}
_FORM_FIELDS = {"prompt": _PROMPT, "prompt_image_file": _PICTURE, **_MORE_FIELDS}
_TEXT_FIELDS = {"prompt": _PROMPT, **_MORE_FIELDS}


_ONE = {"oneOf": [{"required": ["prompt"]}, {"required": ["prompt_image_file"]}]}


def _object(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False, **more}


PRIORITY = {
    "name": "X-Priority",
    "in": "header",
    "description": "background requests are paused while there are interactive ones, and have no deadline",
    "schema": {"type": "string", "enum": list(intake.PRIORITIES), "default": intake.PRIORITIES[0]},
}
FORM = {
    "parameters": [
        {
            "name": "X-Request-Id",
            "in": "header",
            "description": f"the request's id, for /events/{{request_id}}: 1 to {intake.MAX_REQUEST_ID_CHARACTERS} of "
            "A-Z a-z 0-9 . _ -",
            "schema": {"type": "string", **REQUEST_ID},
        },
        PRIORITY,
    ],
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": _object(_FORM_FIELDS, **_ONE),
                "encoding": {"prompt_image_file": {"contentType": ", ".join(pictures.IMAGE_FORMATS.values())}},
            },
            "application/x-www-form-urlencoded": {"schema": _object(_TEXT_FIELDS, required=["prompt"])},
        },
    },
}


def score(prompt: str) -> dict[str, Any]:
    """The body of a scoring request by ``prompt`` or ``prompt_image``: one form for each compression of the splat."""
    schema = intake.ScoreRequest.model_json_schema()
    # The prompt that is not meant may be null, the one that is meant may not.
    picture = next(each for each in schema["properties"]["prompt_image"]["anyOf"] if each["type"] == "string")
    meant = {"prompt": _PROMPT, "prompt_image": {**picture, "minLength": 1, "format": "picture-base64"}}
    forms = []
    for number, kind in enumerate(("ply", "zstd", "spz")):
        data = {**schema["properties"]["data"], "format": f"{kind}-base64"}
        compression = {**schema["properties"]["compression"], "minimum": number, "maximum": number}
        unused = {name: {**schema["properties"][name], "description": "unused here"} for name in meant}
        changed = {prompt: meant[prompt], "data": data, "compression": compression}
        properties = {**schema["properties"], **unused, **changed}
        required = [prompt, "data"] + (["compression"] if number else [])
        forms.append({"type": "object", "properties": properties, "required": required})
    content = {"application/json": {"schema": {"oneOf": forms}}}
    return {"parameters": [PRIORITY], "requestBody": {"required": True, "content": content}}
