"""What figures show of several seeds: their mean and their range, without what is not finite."""

import numpy as np

from effscale.training.plotting import band, pyplot


def drawn(curves):
    """The line's points, and the least and greatest height of the band."""
    plt = pyplot()
    figure, axes = plt.subplots()
    band(axes, np.array([1.0, 2.0, 3.0]), curves, color="black", label="an arm")
    (line,), (area,) = axes.lines, axes.collections
    heights = area.get_paths()[0].vertices[:, 1]
    points = line.get_xydata().tolist()
    plt.close(figure)
    return points, float(heights.min()), float(heights.max())


def test_mean_and_range():
    curves = np.array([[4.0, 3.0, 1.0], [6.0, 3.0, 2.0]])
    assert drawn(curves) == ([[1.0, 5.0], [2.0, 3.0], [3.0, 1.5]], 1.0, 6.0)


def test_a_run_that_diverged_counts_up_to_there():
    curves = [np.array([4.0, np.nan]), np.array([6.0, 3.0, 2.0])]
    assert drawn(curves)[0] == [[1.0, 5.0], [2.0, 3.0], [3.0, 2.0]]
    assert drawn([np.array([4.0]), np.array([6.0, np.inf])])[0] == [[1.0, 5.0]]
