"""What the tests of the modules that run apt share."""

from __future__ import annotations

LISTS_LOCK = (
    "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 812 (apt-get)\n"
    "E: Unable to lock directory /var/lib/apt/lists/\n"
)


class Locked:
    """A host on which another program holds a lock for some time, by a clock of its own."""

    def __init__(self, seconds: float, words: str) -> None:
        """Take how long from now, in seconds, and what apt says meanwhile."""
        self.seconds = seconds
        self.words = words
        self.now = 0.0
        self.commands: list[list[str]] = []

    def run_command(self, words: list[str], **_: object) -> tuple[int, str, str]:
        """Return how a command ends now: status, output, errors."""
        self.commands.append(words)
        return (0, "done", "") if self.now >= self.seconds else (100, "", self.words)

    def monotonic(self) -> float:
        """Return the time of this clock, in seconds."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let the time pass."""
        self.now += seconds
