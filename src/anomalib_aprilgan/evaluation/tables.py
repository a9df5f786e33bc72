"""Markdown tables of a benchmark, in the layout of the paper's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from ..metrics import METRICS
from .cells import DONE, FAILED, FULL
from .published import DATASETS, method_of, official_code, report_table

PAPER = METRICS[:7]
"""The metrics of the paper's tables, in their order."""

OTHERS = ("aupro", "aupro_exact", "pixel_aupr", "image_aupr", "pixel_f1_max", "image_f1_max", "challenge_f1_max")
_TITLES = {
    "pixel_auroc": "pixel AUROC",
    "pixel_f1_max": "pixel F1-max",
    "pixel_ap": "pixel AP",
    "aupro": "AUPRO",
    "image_auroc": "image AUROC",
    "image_f1_max": "image F1-max",
    "image_ap": "image AP",
    "aupro_exact": "AUPRO, exact",
    "pixel_aupr": "pixel AUPR",
    "image_aupr": "image AUPR",
    "challenge_f1_max": "harmonic mean of F1-max",
}
_NOTHING, _FLAG = "\N{EN DASH}", "\N{WARNING SIGN}"
_LONGEST_REASON = 400


def title_of(metric: str) -> str:
    """A metric as tables and plots name it."""
    return _TITLES[metric]


def setting_of(k_shot: int) -> str:
    """A number of references as tables and plots name it."""
    return {0: "zero-shot", FULL: "all images"}.get(k_shot, f"{k_shot}-shot")


def row_name(model: str, accelerator: str | None) -> str:
    """A model as tables and plots name it, with its accelerator where there are several."""
    return model if accelerator is None else f"{model} on {accelerator}"


def labelled(frame: pd.DataFrame) -> pd.DataFrame:
    """Results as tables show them: rows are told apart by accelerators, and data sets by the lists of their images.

    Cells of one category whose test images differ are never in one table.

    Args:
        frame: ``Results.frame``.
    """
    frame = frame.copy()
    if frame.accelerator.nunique() > 1:
        frame["model"] = [row_name(*pair) for pair in zip(frame.model, frame.accelerator, strict=True)]
    done = frame[frame.status == DONE]
    lists = done.groupby(["dataset", "category"], sort=False).test_files.unique()
    for (dataset, category), digests in lists.items():
        for number, digest in list(enumerate(digests))[1:]:
            chosen = (frame.dataset == dataset) & (frame.category == category) & (frame.test_files == digest)
            frame.loc[chosen, "dataset"] = f"{dataset}, other test images ({number + 1})"
    return frame


def settings_in(frame: pd.DataFrame) -> list[int]:
    """Numbers of references, rising, all images last."""
    return sorted(frame.k_shot.unique(), key=lambda k_shot: (k_shot == FULL, k_shot))


def means_of_seeds(rows: pd.DataFrame, metric: str) -> pd.Series:
    """A metric's mean over the categories that have it, by seed."""
    return rows.groupby("seed")[metric].mean()


def summary(frame: pd.DataFrame) -> str:
    """The paper's table for every data set: mean over categories, ± deviation of it over seeds.

    Args:
        frame: ``Results.frame``.

    Returns:
        Markdown, percent; empty if no cell is done.
    """
    return _table_per_data_set(frame, PAPER)


def exact_metrics(frame: pd.DataFrame) -> str:
    """Anomalib's metrics and the challenge's beside the paper's, laid out as ``summary``."""
    return _table_per_data_set(frame, OTHERS)


def comparison(frame: pd.DataFrame, tolerance: float) -> str:
    """Means over all categories beside the report's, and categories beside those of the authors' code.

    Args:
        frame: ``Results.frame``.
        tolerance: Difference, as a fraction, beyond which a figure is flagged, if it is also beyond two
            published standard deviations.

    Returns:
        Markdown, percent; empty where there is nothing to compare with.
    """
    parts = []
    for _, rows in _done(frame).groupby("dataset", sort=False):
        named, datamodule = rows[rows.model.map(method_of).notna()], str(rows.datamodule.iloc[0])
        if datamodule in DATASETS and len(named):
            parts += [_beside_report(datamodule, named, tolerance), _beside_code(datamodule, named, tolerance)]
    return "\n\n".join(part for part in parts if part)


def per_category(frame: pd.DataFrame) -> str:
    """All metrics of the paper for every category, mean ± deviation over seeds."""
    parts = []
    for dataset, rows in _done(frame).groupby("dataset", sort=False):
        for k_shot in settings_in(rows):
            chosen = rows[rows.k_shot == k_shot]
            lines = [
                (category, model, *(_percent(group[metric]) for metric in PAPER))
                for (category, model), group in chosen.groupby(["category", "model"], sort=False)
            ]
            table = _markdown(("category", "model", *map(title_of, PAPER)), lines)
            parts.append(f"## {dataset}, {setting_of(k_shot)}\n\n{table}")
    return "\n\n".join(parts)


def costs(frame: pd.DataFrame) -> str:
    """Time and memory of the network alone for one image, mean over categories and seeds."""
    parts = []
    done = _done(frame)
    for dataset, rows in done[done.seconds_per_image.notna()].groupby("dataset", sort=False):
        lines = [
            (
                setting_of(k_shot),
                model,
                f"{1000 * group.seconds_per_image.mean():.1f}",
                f"{group.peak_memory_mb.max():.0f}",
            )
            for k_shot, model, group in _rows_of(rows)
        ]
        parts.append(f"## {dataset}\n\n{_markdown(('setting', 'method', 'ms', 'MB at most'), lines)}")
    note = "Of the network alone, one image at a time. Memory is that of the whole process on a CPU."
    return "\n\n".join([*parts, note]) if parts else ""


def failures(frame: pd.DataFrame) -> str:
    """Cells that failed, with the reason; empty if none did."""
    failed = frame[frame.status == FAILED]
    lines = [
        (row.model, row.dataset, row.category, setting_of(row.k_shot), str(row.seed), row.reason[:_LONGEST_REASON])
        for row in failed.itertuples()
    ]
    return _markdown(("model", "data", "category", "setting", "seed", "reason"), lines) if lines else ""


def _table_per_data_set(frame: pd.DataFrame, metrics: Sequence[str]) -> str:
    parts = []
    for dataset, rows in _done(frame).groupby("dataset", sort=False):
        wanted = list(frame[frame.dataset == dataset].category.unique())
        notes: list[str] = []
        lines = []
        for k_shot, model, group in _rows_of(rows):
            marks = _marks(group, wanted, metrics, notes)
            lines.append((setting_of(k_shot), model + marks, *(_percent(means_of_seeds(group, m)) for m in metrics)))
        seeds = rows.groupby(["model", "k_shot"]).seed.nunique().max()
        words = f"{len(wanted)} {'category' if len(wanted) == 1 else 'categories'}, "
        words += f"{seeds} {'seed' if seeds == 1 else 'seeds'}"
        table = _markdown(("setting", "method", *map(title_of, metrics)), lines)
        sizes = " and ".join(sorted(rows.evaluation_size.unique()))
        words += f"; pixels at the size of the {sizes}" if "ground" in sizes else f"; pixels at {sizes}"
        title = f"## {dataset} ({words}; percent, mean over categories"
        title += ", ± its population standard deviation over seeds)" if seeds > 1 else ")"
        parts.append("\n\n".join([title, table, *notes]))
    return "\n\n".join(parts)


def _marks(group: pd.DataFrame, wanted: Sequence[str], metrics: Sequence[str], notes: list[str]) -> str:
    """Footnote numbers of a row, whose notes are added: what its means leave out."""
    left_out = []
    missing = [category for category in wanted if not _in_every_seed(group, category)]
    if missing:
        left_out.append(f"no results, or not of every seed, for {', '.join(missing)}")
    for metric in metrics:
        without = sorted(group[group[metric].isna()].category.unique())
        if without and len(without) < group.category.nunique():
            left_out.append(f"{title_of(metric)} does not exist for {', '.join(without)}, which its mean leaves out")
    marks = ""
    for words in left_out:
        starts = [note.partition(" ")[2] for note in notes]
        if words not in starts:
            notes.append(f"[{len(notes) + 1}] {words}")
            starts.append(words)
        marks += f" [{starts.index(words) + 1}]"
    return marks


def _in_every_seed(group: pd.DataFrame, category: str) -> bool:
    return bool(group[group.category == category].seed.nunique() == group.seed.nunique())


def _beside_report(dataset: str, rows: pd.DataFrame, tolerance: float) -> str:
    published = report_table(dataset)
    reference = official_code(dataset, 0)
    categories = set() if reference is None else set(reference.index)
    lines, partial = [], False
    for k_shot, model, group in _rows_of(rows):
        method = method_of(model)
        if (k_shot, method) not in published.index:
            continue
        if not all(_in_every_seed(group, category) for category in categories):
            partial = True
            continue
        line = published.loc[(k_shot, method)]
        figures = [
            _beside(means_of_seeds(group, metric).mean(), line[metric], tolerance, line[f"{metric}_std"])
            for metric in PAPER
        ]
        lines.append((setting_of(k_shot), model, *figures))
    title = f"## {dataset}: ours / the report's table (difference), percent"
    note = f"{_FLAG}: further off than {100 * tolerance:.1f} points and than two published standard deviations."
    part = "Models without results for all categories are left out: the report gives means alone."
    table = _markdown(("setting", "method", *map(title_of, PAPER)), lines) if lines else ""
    return (
        "\n\n".join([title, *([table, note] if lines else []), *([part] if partial else [])])
        if lines or partial
        else ""
    )


def _beside_code(dataset: str, rows: pd.DataFrame, tolerance: float) -> str:
    lines = []
    for k_shot in settings_in(rows):
        published = official_code(dataset, k_shot)
        ours = rows[(rows.k_shot == k_shot) & (rows.model.map(method_of) == "APRIL-GAN")]
        if published is None:
            continue
        for (model, category), group in ours.groupby(["model", "category"], sort=False):
            if category in published.index:
                line = published.loc[category]
                figures = [_beside(group[metric].mean(), line[metric], tolerance) for metric in PAPER]
                lines.append((setting_of(k_shot), model, category, *figures))
    if not lines:
        return ""
    title = f"## {dataset}: ours / a rerun of the authors' code (difference), percent"
    note = f"{_FLAG}: further off than {100 * tolerance:.1f} points. Their 4-shot references are one draw, of seed 42."
    table = _markdown(("setting", "method", "category", *map(title_of, PAPER)), lines)
    return "\n\n".join([title, table, note])


def _rows_of(rows: pd.DataFrame) -> Iterator[tuple[int, str, pd.DataFrame]]:
    for k_shot in settings_in(rows):
        for model, group in rows[rows.k_shot == k_shot].groupby("model", sort=False):
            yield k_shot, str(model), group


def _beside(ours: float, published: float, tolerance: float, deviation: float = 0.0) -> str:
    if pd.isna(published):
        return f"{_number(ours)} / {_NOTHING}"
    if pd.isna(ours):
        return f"{_NOTHING} / {_number(published)}"
    difference = ours - published
    allowed = max(tolerance, 2 * (0.0 if pd.isna(deviation) else deviation))
    flag = f" {_FLAG}" if abs(difference) > allowed else ""
    return f"{_number(ours)} / {_number(published)} ({100 * difference:+.1f}){flag}"


def _percent(values: pd.Series) -> str:
    values = values.dropna()
    if values.empty:
        return _NOTHING
    spread = f" ± {100 * values.std(ddof=0):.1f}" if len(values) > 1 else ""
    return f"{_number(values.mean())}{spread}"


def _number(value: float) -> str:
    return _NOTHING if pd.isna(value) else f"{100 * value:.1f}"


def _done(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame.status == DONE]


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return markdown(header, [[" ".join(cell.replace("|", "\\|").split()) for cell in line] for line in lines])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
