"""Entry point of the miner: arguments, logging, signals, then `CompetitiveMiner` until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

from neurons import home
from neurons.miner import options as miner_options

log = logging.getLogger("neurons.serve_miner_competitive")


def main() -> int:
    """Runs the miner until SIGTERM or SIGINT; the process' exit status."""
    options = miner_options.parse(sys.argv[1:])
    home_problem = home.prepare()
    # Only now: these bring bittensor, which takes seconds to import.
    from neurons import logging_setup
    from neurons.miner.app import CompetitiveMiner

    try:
        logging_setup.configure(options.log_file)
    except OSError as error:
        sys.exit(f"Log file {options.log_file}: {error.strerror}")
    if home_problem:
        log.warning("%s; the miner goes on without", home_problem)

    async def run() -> int:
        miner = CompetitiveMiner(options)
        loop = asyncio.get_running_loop()
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signal_number, miner.stop)
        return await miner.run()

    return asyncio.run(run())


if __name__ == "__main__":
    sys.exit(main())
