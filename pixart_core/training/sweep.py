"""What a ControlNet does at each strength, as a chart and as a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .chart import BLUE, VERMILION, Axis, Level, Line, line_chart
from .evaluate import ControlRow

if TYPE_CHECKING:
    from PIL.Image import Image

_FARTHEST = 2.0  # strength at the chart's right end, at least
_COLUMNS = ("pictures", "strength", "edge_f1", "edge_f1_error", "precision", "recall", "accuracy",
            "accuracy_error", "count")


def sweep_axes(rows: Sequence[ControlRow]) -> tuple[Axis, Axis]:
    """Strength across, from 0 to 2 or the largest; shares of 0 to 1 up."""
    farthest = max(_FARTHEST, *(row.strength for row in rows))
    return Axis("control strength", 0.0, farthest), Axis("share", 0.0, 1.0)


def sweep_chart(rows: Sequence[ControlRow], limits: Mapping[str, ControlRow]) -> Image:
    """Edge F-score and prompt accuracy over the strength, with standard errors (1600 x 1100 px).

    `limits`, as `control_limits` gives them, are drawn across: dotted what true renders score,
    dashed the same after the VAE. Accuracy is the share of pictures that are right in all that
    their prompt asks for.
    """
    rows = sorted(rows, key=lambda row: row.strength)
    accuracy = [row.report.rows["all"]["all"] for row in rows]
    lines = [
        Line("edge F-score", [(row.strength, row.f1) for row in rows], BLUE,
             [row.f1_error for row in rows]),
        Line("prompt accuracy", [(row.strength, share.mean)
                                 for row, share in zip(rows, accuracy, strict=True)],
             VERMILION, [share.error for share in accuracy], square=True)]
    levels = []
    for name, limit in limits.items():
        dotted = name == next(iter(limits))
        levels += [Level(f"edge F-score, {name}", limit.f1, BLUE, dotted),
                   Level(f"prompt accuracy, {name}", limit.report.rows["all"]["all"].mean,
                         VERMILION, dotted)]
    count = accuracy[0].count
    return line_chart(f"ControlNet strength, {count} held-out prompts each", *sweep_axes(rows),
                      lines, levels)


def sweep_table(rows: Sequence[ControlRow], limits: Mapping[str, ControlRow]) -> str:
    """The numbers of the chart as CSV: first the limits, which have no strength."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for name, row in [*limits.items(), *(("model", row) for row in rows)]:
        share = row.report.rows["all"]["all"]
        writer.writerow([name, "" if row.strength is None else row.strength, row.f1, row.f1_error,
                         row.precision, row.recall, share.mean, share.error, share.count])
    return text.getvalue()
