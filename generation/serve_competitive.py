"""Entry point of the generation service: ``python -m generation.serve_competitive``."""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import uvicorn
from pydantic import ValidationError

from common.log_lines import escape
from generation.engine.engine import Engine
from generation.fleet.fleet import Fleet
from generation.logging_setup import setup_logging
from generation.schema.options import SettingsError
from generation.schema.score import formula
from generation.settings import Arguments, Settings
from generation.web.app import create_app

if TYPE_CHECKING:
    from generation.pipeline.pipeline import Pipeline

#: What the requests in flight get to finish in, after SIGTERM. In seconds.
GRACE_S = 20

log = logging.getLogger("generation.serve")


def parse(argv: Sequence[str] | None = None) -> dict[str, str | None]:
    """The command line as text, None where nothing is given. ``Settings`` knows types, limits and defaults."""
    default = {name: field.default for name, field in Arguments.model_fields.items()}
    parser = argparse.ArgumentParser(prog="serve_competitive", description="The generation service.")
    parser.add_argument("--profile", help=f"auto, full or tiny (default: {default['profile']})")
    parser.add_argument("--config", help="config of the generator for texts, a YAML (default: the profile's)")
    parser.add_argument("--image-config", help="config of the generator for pictures (default: the profile's)")
    parser.add_argument("--models", help="models file in place of the profile's")
    parser.add_argument("--host", help=f"address to listen on (default: {default['host']})")
    parser.add_argument("--port", help=f"port to listen on (default: {default['port']})")
    parser.add_argument(
        "--allowed-hosts",
        help="names or addresses, separated by commas, by which requests may call it (default: those of loopback, and "
        "--host where that is one address)",
    )
    parser.add_argument("--flux-steps", help="steps of text to image (default: the profile's)")
    parser.add_argument("--max-gaussians", help="most Gaussians of a splat (default: the config's max_gaussians)")
    parser.add_argument(
        "--validation-threshold",
        help=f"lowest final score that is delivered, 0..1 (default: {default['validation_threshold']})",
    )
    parser.add_argument("--log-file", help="rotating log (default: logs/generation_service.log)")
    parser.add_argument("--memory-class", help="a memory class of the models file (default: by the GPU's memory)")
    parser.add_argument("--max-queue", help=f"requests that may wait (default: {default['max_queue']})")
    parser.add_argument("--gpus", help=f"all, or numbers of GPUs such as 0,1 (default: {default['gpus']})")
    parser.add_argument("--profile-trace", help="write a torch.profiler trace of the first request here (gzipped JSON)")
    return vars(parser.parse_args(argv))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, before the slow imports: clients wait instead of being refused. Raises OSError.

    Also UnicodeError, for what can be no host's name.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
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


class Server(uvicorn.Server):
    """Ends the event streams before it waits for its open answers, which would never be done."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.events.close()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def main(argv: Sequence[str] | None = None) -> int:
    values = parse(argv)
    given = {key: value for key, value in values.items() if value is not None}
    try:
        arguments = Arguments.model_validate(given)
    except ValidationError as error:
        for each in error.errors():
            flag = str(each["loc"][0]).replace("_", "-")
            print(f"serve_competitive: --{flag} {escape(str(each['input']))}: {each['msg']}", file=sys.stderr)
        return 2
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
        settings = Settings.resolve(given)
    except SettingsError as error:
        log.error("%s", error)
        return 2
    log.info("Profile %s: %s", settings.profile, settings.profile_reason)
    log.info("Memory class %s: %s", settings.memory_class or "none", settings.memory_reason)
    log.info("Score: %s", formula(settings.models.score_parts))
    for stage, reason in settings.missing.items():
        log.warning("The score goes without %s: %s", stage, reason)
    log.info("Listening on %s port %d", settings.host, settings.port)
    app = create_app(make_engine(settings), settings)
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=GRACE_S)
    # uvicorn raises the signal that stopped it once more when it is done; by then there is nothing left to end.
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda *_: None)
    Server(config).run(sockets=[listener])
    log.info("Stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
