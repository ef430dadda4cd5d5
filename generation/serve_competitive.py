"""Entry point of the generation service: ``python -m generation.serve_competitive``."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI

from generation.arguments import COMMAND_LINE, ROOT, TABLES, Arguments
from generation.engine.engine import Engine
from generation.fleet.actors import ClusterFleet
from generation.fleet.cluster import ClusterError, connect
from generation.fleet.fleet import Fleet
from generation.logging_setup import setup_logging
from generation.schema.options import SettingsError
from generation.schema.score import formula
from generation.settings import Settings, resolve_elsewhere
from generation.web.app import create_app
from generation.web.connections import Connection

if TYPE_CHECKING:
    from generation.pipeline.pipeline import Pipeline

#: Seconds that requests in flight have after SIGTERM.
GRACE_S = 20
#: Seconds after which the kernel closes a connection whose client takes none of what is sent to it.
STALL_S = 60

log = logging.getLogger("generation.serve")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, before the slow imports: clients wait instead of being refused. Raises OSError.

    Also UnicodeError, if ``host`` is not a host name.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_S * 1000)  # connections inherit it
        listener.bind(address)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def make_engine(settings: Settings) -> Engine | Fleet:
    """An engine process for each GPU; on the CPU, one engine in this process."""
    if settings.gpus:
        untraced = settings.model_copy(update={"profile_trace": None})
        return Fleet({f"cuda:{gpu}": untraced if i else settings for i, gpu in enumerate(settings.gpus)})

    def load(progress: Callable[[str], None]) -> Pipeline:
        progress("importing torch and the model libraries")
        from generation.pipeline import trace

        return trace.load(settings, progress)

    return Engine(load, settings.max_queue, settings.models.max_batch, settings.device)


def make_cluster_fleet(arguments: Arguments, values: Mapping[str, Any]) -> Fleet:
    """An engine for each GPU of a Ray cluster. Raises ClusterError."""
    joined = connect(arguments.cluster, arguments.cluster_token_file)
    absolute = {key: value.absolute() if isinstance(value, Path) else value for key, value in values.items()}
    return ClusterFleet(joined, partial(resolve_elsewhere, absolute, ROOT), arguments.max_queue)


class Server(uvicorn.Server):
    """At its end closes the event streams, which never finish, before it waits for open responses."""

    def __init__(self, app: FastAPI, grace_s: int = GRACE_S) -> None:
        config = uvicorn.Config(
            app, http=Connection, log_config=None, access_log=False, timeout_graceful_shutdown=grace_s
        )
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.events.close()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service until it is stopped. Returns the exit status."""
    given = COMMAND_LINE.parse(sys.argv[1:] if argv is None else argv)
    values = {key: value for table in TABLES for key, value in vars(given[table]).items() if given.has(table, key)}
    arguments = Arguments(**values)
    try:
        if given.asked_to_save:
            given.save()
    except OSError as error:
        print(f"serve_competitive: --config-file {given.args.config_file}: {error.strerror}", file=sys.stderr)
        return 1
    try:
        setup_logging(arguments.log_file)
    except OSError as error:
        print(f"serve_competitive: log file {arguments.log_file}: {error}", file=sys.stderr)
        return 1
    try:
        listener = listen(arguments.host, arguments.port)
    except (OSError, UnicodeError) as error:
        log.error("Can not listen on %s port %d: %s", arguments.host, arguments.port, error)
        return 1
    try:
        settings = Settings.resolve(values)
    except SettingsError as error:
        log.error("%s", error)
        return 2
    try:
        engine = make_cluster_fleet(arguments, values) if arguments.cluster else make_engine(settings)
    except ClusterError as error:
        log.error("%s", error)
        return 1
    log.info("Profile %s: %s", settings.profile, settings.profile_reason)
    log.info("Memory class %s: %s", settings.memory_class or "none", settings.memory_reason)
    log.info("Score: %s", formula(settings.models.score_parts))
    for stage, reason in settings.missing.items():
        log.warning("The score goes without %s: %s", stage, reason)
    log.info("Listening on %s port %d", settings.host, settings.port)
    app = create_app(engine, settings)
    # uvicorn raises the signal again after its shutdown; by then there is nothing left to end.
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda *_: None)
    Server(app).run(sockets=[listener])
    log.info("Stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
