"""What ranks raise when one of them fails: who has the cause, who only stops, and whether it would happen again."""

from __future__ import annotations

from collectives.launch import LaunchError


class RootFailed(RuntimeError):
    """Another rank raised inside `on_root` or `each`; it reports the cause itself, this one only stops.

    refused  whether the cause is something that was asked for wrongly (ValueError)
    """

    raised_everywhere = True

    def __init__(self, text: str, refused: bool = False):
        super().__init__(text)
        self.refused = refused


class PeerLost(RuntimeError):
    """A rank that this one waits for is gone; the message names it, and what it was waited for."""


def is_refusal(error: BaseException) -> bool:
    """Whether the same would be raised again: something that was asked for wrongly, and not what a disk or link did."""
    if isinstance(error, RootFailed):
        return error.refused
    return isinstance(error, ValueError | LaunchError) and not isinstance(error.__cause__, OSError)


def everywhere(error: BaseException) -> BaseException:
    """Mark an error as raised on all ranks at once: nobody waits, so the job can end without an abort."""
    error.raised_everywhere = True  # type: ignore[attr-defined]
    return error
