"""Published figures to compare with, as fractions.

``table3_mvtec_ad.csv`` and ``table4_visa.csv`` are the tables 3 and 4 of the report (arXiv:2305.17382). The files
``*_official_code.csv`` are an independent rerun of the authors' code at commit f13b8a6 with the authors' adapters
(public repository TUK-AI-HC-LAB/lab-m5hfg, method11): zero-shot, and four shots with the references of its seed 42.
Their means equal the tables to 0.8 points.
"""

from __future__ import annotations

import re
from importlib.resources import as_file, files

import pandas as pd

_NAMES = {"MVTecAD": ("table3_mvtec_ad", "mvtec_ad"), "Visa": ("table4_visa", "visa")}
_SETTINGS = {"zero-shot": 0, "1-shot": 1, "2-shot": 2, "4-shot": 4}
_OFFICIAL = {0: "0shot", 4: "4shot_seed42"}
DATASETS = tuple(_NAMES)


def report_table(dataset: str) -> pd.DataFrame:
    """A table of the report: mean over all categories, and ``*_std`` over five seeds where given.

    Args:
        dataset: One of ``DATASETS``, names of anomalib's datamodules.

    Returns:
        One row per pair of ``k_shot`` and ``method``, which are the index; NaN where nothing was published.
    """
    table = _read(_NAMES[dataset][0])
    table["k_shot"] = table.pop("setting").map(_SETTINGS)
    return table.set_index(["k_shot", "method"]) / 100.0


def official_code(dataset: str, k_shot: int) -> pd.DataFrame | None:
    """Every category by the authors' code; none for a number of shots that was not run.

    Args:
        dataset: One of ``DATASETS``.
        k_shot: Number of references.

    Returns:
        One row per category, which is the index.
    """
    if k_shot not in _OFFICIAL:
        return None
    return _read(f"{_NAMES[dataset][1]}_{_OFFICIAL[k_shot]}_official_code").set_index("category")


def method_of(model: str) -> str | None:
    """The method of the report that a model's name in the tables stands for, however it is written."""
    methods = {"aprilgan": "APRIL-GAN", "winclip": "WinCLIP", "patchcore": "PatchCore", "padim": "PaDiM"}
    return methods.get(re.sub(r"[^a-z]", "", model.lower()))


def _read(name: str) -> pd.DataFrame:
    with as_file(files(__package__) / f"{name}.csv") as path:
        return pd.read_csv(path)
