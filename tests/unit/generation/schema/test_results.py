"""What travels from intake to the result."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from PIL import Image

from generation.schema.results import Request

PICTURE = Image.new("RGBA", (3, 2), (255, 0, 0, 90))


@pytest.mark.parametrize(
    ("given", "found"), [({}, "neither"), ({"prompt": "a red cube", "image": PICTURE}, "both")], ids=["neither", "both"]
)
def test_a_request_is_made_of_exactly_one_of_prompt_and_image(given: dict[str, Any], found: str) -> None:
    with pytest.raises(ValueError, match=f"exactly one of prompt and image, not of {found}"):
        Request(**given, seed=1, threshold=0.6)


def test_it_arrives_in_another_process_as_it_was() -> None:
    text = Request(prompt="a red cube", seed=7, threshold=0.6, deadline=12.5)
    picture = Request(image=PICTURE, target=PICTURE.convert("RGB"), seed=7, threshold=0.6, background=True)
    assert [pickle.loads(pickle.dumps(request)) for request in (text, picture)] == [text, picture]
