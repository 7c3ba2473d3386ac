"""What the commands of bench/ share: one message for a mistake of the user."""

import functools
import sys
from collections.abc import Callable, Sequence

from fradique.io.terminal import command_output, is_closed_pipe


def bench_command(main: Callable[[Sequence[str] | None], None]) -> Callable[..., None]:
    """Decorator of a main function: `command_output`, and exit status 2 after the message of a mistake.

    That is a ValueError or OSError, such as an unknown setting or a missing corpus.
    """

    @functools.wraps(main)
    @command_output()
    def run(argv: Sequence[str] | None = None) -> None:
        try:
            main(argv)
        except (ValueError, OSError) as error:
            if is_closed_pipe(error):
                raise  # command_output handles it
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return run
