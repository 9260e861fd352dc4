"""Delta features: the regression slope of every feature over its neighbouring frames.

Legend: T frames, D features a frame.
"""

from __future__ import annotations

import numpy as np

WINDOW = 2  # frames to each side
ORDERS = 2


def slope(features_TD: np.ndarray) -> np.ndarray:
    """First-order deltas [T, D] float64 of `features_TD` [T, D]; frames beyond the edges repeat the edge frame.

    d[t] = sum over n = 1..2 of n * (x[t + n] - x[t - n]), divided by 2 * (1 + 4) = 10.

    Source: HTK book, section 5.9, equation 5.16, with window 2; Kaldi's compute-deltas has the same window.
    """
    padded = np.pad(np.asarray(features_TD, np.float64), ((WINDOW, WINDOW), (0, 0)), mode="edge")
    frames = len(features_TD)
    total = np.zeros((frames, padded.shape[1]))
    for n in range(1, WINDOW + 1):
        later, earlier = padded[WINDOW + n : WINDOW + n + frames], padded[WINDOW - n : WINDOW - n + frames]
        total += n * (later - earlier)
    return total / (2 * sum(n * n for n in range(1, WINDOW + 1)))


def add_deltas(features_TD: np.ndarray, orders: int) -> np.ndarray:
    """The features with their deltas beside them: [T, (1 + orders) * D] float32; 13 values and 2 orders give 39.

    features_TD  [T, D], at least one frame
    orders       0 (the features alone), 1 (and slopes) or 2 (and slopes of slopes)

    Raises ValueError for another number of orders.
    Source: HTK book, section 5.9. Kaldi computes the second order from the features in one pass of width 9, so its
    first and last four frames differ from these; all others agree.
    """
    if orders not in range(ORDERS + 1):
        raise ValueError(f"deltas = {orders}: the orders are 0 (none), 1 (slopes) and 2 (slopes of slopes)")
    columns = [np.asarray(features_TD, np.float64)]
    for _ in range(orders):
        columns.append(slope(columns[-1]))
    return np.concatenate(columns, axis=1).astype(np.float32)
