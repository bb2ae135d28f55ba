"""Which documents share a window."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from itertools import accumulate


def pack(lengths: Sequence[int], window_length: int, num_windows: int | None = None) -> list[list[int]]:
    """Packs documents into windows, as full as best-fit decreasing makes them.

    Args:
        lengths: tokens of the documents, 1 to `window_length` each.
        window_length: tokens of a window.
        num_windows: takes as many of the first documents as fit into so many windows; None takes all.

    Returns:
        For each window, the numbers of its documents. There are fewer windows than `num_windows` only if all documents
        fit into fewer.
    """
    if num_windows is None:
        return _best_fit_decreasing(lengths, window_length)

    def needed(number: int) -> int:  # windows for so many documents
        return len(_best_fit_decreasing(lengths[:number], window_length))

    most = bisect_right(list(accumulate(lengths)), num_windows * window_length)
    number = bisect_right(range(most + 1), num_windows, key=needed) - 1
    return _best_fit_decreasing(lengths[:number], window_length)


def _best_fit_decreasing(lengths: Sequence[int], window_length: int) -> list[list[int]]:
    """From the longest to the shortest, each document joins the fullest window with room for it, or begins one."""
    windows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # free tokens and number of each window, sorted
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        at = bisect_left(room, (lengths[number], 0))
        if at < len(room):
            free, window = room.pop(at)
        else:
            free, window = window_length, len(windows)
            windows.append([])
        windows[window].append(number)
        insort(room, (free - lengths[number], window))
    return windows
