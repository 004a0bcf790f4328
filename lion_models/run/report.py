"""Figures of each class, from true and predicted labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from lion_models.base.errors import UserError

__all__ = ["CONFUSION", "PAGE", "REPORT", "class_report", "read_report"]

REPORT = "report.json"
CONFUSION = "confusion.png"
PAGE = "report.html"


def class_report(classes: tuple[str, ...], truth: Tensor, predicted: Tensor) -> dict[str, Any]:
    """Precision, recall, F1 and support of each class, by scikit-learn.

    Args:
        classes: names, in the order of the labels.
        truth: int64 (n,).
        predicted: int64 (n,).

    Returns:
        `images`, `accuracy`, `balanced_accuracy` (mean recall), `macro_f1`, `classes` (a row each:
        `class`, `precision`, `recall`, `f1`, `support`) and `confusion` (true x predicted). A
        precision or recall without any image to divide by is 0.
    """
    # Imported here: it takes a second, and most commands do without.
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    labels = list(range(len(classes)))
    columns = precision_recall_fscore_support(
        truth.numpy(), predicted.numpy(), labels=labels, zero_division=0
    )
    rows = [
        {
            "class": name,
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            "support": int(support),
        }
        for name, precision, recall, f1, support in zip(classes, *columns, strict=True)
    ]
    present = [row for row in rows if row["support"]]
    return {
        "images": len(truth),
        "accuracy": (truth == predicted).double().mean().item(),
        "balanced_accuracy": sum(row["recall"] for row in present) / max(1, len(present)),
        "macro_f1": sum(row["f1"] for row in present) / max(1, len(present)),
        "classes": rows,
        "confusion": confusion_matrix(truth.numpy(), predicted.numpy(), labels=labels).tolist(),
    }


def read_report(path: Path) -> dict[str, Any]:
    """The report beside a run's test ledger."""
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: missing or damaged ({error}); remove it and repeat") from error
    return report
