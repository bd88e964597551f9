"""Until the service listens, a signal ends the process at once: imports take seconds, and nothing is under way.

Import it before anything that takes time; it imports nothing of ours.
"""

import os
import signal
from contextlib import ExitStack, suppress


class Starting:
    """From now until `over`, SIGTERM and SIGINT close what `opened` holds and exit with 0; afterwards they do nothing.

    An exception would be caught, or printed, somewhere among the imports. As the first process of a container this one
    would not even end by a signal that it does not handle.
    """

    def __init__(self) -> None:
        self.opened = ExitStack()
        # Mutable state: whether the service looks after signals itself.
        self._over = False
        self._before = {number: signal.signal(number, self._leave) for number in (signal.SIGTERM, signal.SIGINT)}

    def over(self) -> None:
        """The service handles signals. Uvicorn raises again what it got, once it is done: that is no failure."""
        self._over = True

    def give_up(self) -> None:
        """It does not start: signals do what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _leave(self, *_: object) -> None:
        if not self._over:
            with suppress(Exception):
                self.opened.close()
            os._exit(0)
