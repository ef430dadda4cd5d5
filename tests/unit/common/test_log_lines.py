"""What is shown of a stranger's text, and of an address that may hold a key."""

from __future__ import annotations

import pytest

from common.log_lines import shown_network


@pytest.mark.parametrize(
    ("network", "shown"),
    [
        ("finney", "finney"),
        ("ws://127.0.0.1:9944", "ws://127.0.0.1:9944"),
        ("wss://node.example/ws?apikey=SECRET", "wss://node.example"),
        ("wss://node.example:443/SECRET", "wss://node.example:443"),
        ("wss://user:SECRET@node.example#SECRET", "wss://node.example"),
        ("wss://node.example?key=SECRET@x", "wss://node.example"),
    ],
)
def test_no_key_of_a_node_is_shown(network: str, shown: str) -> None:
    assert shown_network(network) == shown
