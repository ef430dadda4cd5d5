"""What is shown of a stranger's text, and of an address that may hold a key."""

from __future__ import annotations

import logging

import pytest

from common.log_lines import SingleLineFormatter, quoted, shown_network


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


def test_no_key_of_a_node_is_logged_by_a_library() -> None:
    address = "wss://user:SECRET@node.example:443/v1?key=SECRET"
    record = logging.LogRecord("x", logging.INFO, "", 0, "Chain: %s. Refused", (address,), None)
    formatter = SingleLineFormatter("%(levelname)s %(message)s")
    assert formatter.format(record) == "INFO Chain: wss://node.example:443 Refused"
    try:
        raise ValueError(f"no node at '{address}'")
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    shown = formatter.format(record)
    assert "SECRET" not in shown
    assert "no node at 'wss://node.example:443" in shown


def test_a_stranger_s_text_can_not_forge_a_line() -> None:
    assert quoted("a\nb\x1b[2J\u2028") == "'a\\nb\\x1b[2J\\u2028'"
    assert len(quoted("\x00" * 10**6)) < 160
    formatter = SingleLineFormatter("%(levelname)s %(message)s")
    record = logging.LogRecord("x", logging.INFO, "", 0, "said: %s", ("a\r\nINFO forged \x1b[2J\x9b\u2028",), None)
    assert formatter.format(record) == "INFO said: a\\r\\nINFO forged \\x1b[2J\\x9b\\u2028"
    try:
        raise ValueError("a\nINFO forged")
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    assert not any(line.startswith("INFO forged") for line in formatter.format(record).split("\n"))
