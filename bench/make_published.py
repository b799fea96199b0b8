"""Packs the scores that the BRC authors released into brc_fast/data (what the files hold: its README.md).

python bench/make_published.py     reads $BRC_FAST_SHARED/published, by default ../shared/published
"""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path(os.environ.get("BRC_FAST_SHARED", ROOT.parent / "shared")) / "published"
LISTS = (
    *("DMC_DOGS", "DMC_HUMANOIDS", "METAWORLD_ALL", "HB_NOHANDS", "HB_HANDS"),
    *("SHADOWHAND_TRAIN", "SHADOWHAND_TEST"),
)


def pack(source: Path, target: Path) -> None:
    """Write scores.csv, normalization.csv and task_lists.json; FileNotFoundError where source is not."""
    runs: dict[tuple[str, ...], list[tuple[int, str]]] = {}
    with (source / "brc_learning_curves.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            run = row["suite"], row["task"], row["mode"], row["seed"]
            runs.setdefault(run, []).append((int(row["point"]), f"{float(row['score']):.5g}"))
    with (target / "scores.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("suite", "task", "mode", "seed", "scores"))
        for run, points in sorted(runs.items()):
            rows.writerow((*run, " ".join(score for _, score in sorted(points))))
    (target / "normalization.csv").write_bytes((source / "score_normalization.csv").read_bytes())
    lists = json.loads((source / "task_lists.json").read_text())
    (target / "task_lists.json").write_text(
        json.dumps({name: lists[name] for name in LISTS}, indent=1) + "\n"
    )


if __name__ == "__main__":
    if not SOURCE.is_dir():
        sys.exit(f"{SOURCE} is missing: set BRC_FAST_SHARED to the folder that holds published/")
    pack(SOURCE, ROOT / "brc_fast" / "data")
