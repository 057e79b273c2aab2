"""Draw pictures of the tables."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

from . import equal_ram
from .results import Results, Section

COLOURS = {
    "cleanfs": "#d62728",
    "cleanfs, no backend": "#f4a6a6",
    "cleanfs, passthrough": "#f4a6a6",
    "page cache alone (ext4)": "#1f77b4",
    "the source itself": "#1f77b4",
    "btrfs, zstd": "#2ca02c",
    "btrfs, lzo": "#98df8a",
    "mergerfs": "#ff7f0e",
    "bindfs": "#bcbd22",
    "rclone, VFS cache": "#9467bd",
    "ext4 on zram (ceiling)": "#7f7f7f",
}


def draw(results: Results, directory: Path) -> dict[str, Path]:
    """Make PNG files by the name of the section; raises ImportError without matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    directory.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, section in results.sections.items():
        panels = _panels(name, section)
        if not panels:
            continue
        figure, axes = plt.subplots(len(panels), 1, figsize=(9, 3.4 * len(panels)), squeeze=False)
        for axis, (title, workloads) in zip(axes[:, 0], panels, strict=True):
            if name == "sweep":
                _lines(axis, section, workloads)
            else:
                _bars(axis, section, workloads)
            axis.set_title(title, fontsize=10)
        figure.suptitle(section.title, fontsize=11)
        figure.tight_layout()
        drawn[name] = directory / f"compare-{name.replace(' ', '-').lower()}.png"
        figure.savefig(drawn[name], dpi=110)
        plt.close(figure)
    return drawn


def _panels(name: str, section: Section) -> list[tuple[str, list[str]]]:
    """Return titles, and the workloads in each; one unit in a panel."""
    if name == "idle":
        return []
    panels: dict[str, list[str]] = {}
    for workload, row in section.cells.items():
        unit = next(iter(row.values())).unit
        kind = workload.split(",")[0] if name in {"equal RAM", "sweep"} else ""
        title = f"{kind}, {unit}" if kind else unit
        panels.setdefault(title, []).append(workload)
    return list(panels.items())


def _bars(axis: "Axes", section: Section, workloads: list[str]) -> None:
    names = [who for who in section.contestants if any(section.get(each, who) for each in workloads)]
    width = 0.8 / len(names)
    values = []
    for place, who in enumerate(names):
        for group, workload in enumerate(workloads):
            cell = section.get(workload, who)
            if cell is None:
                continue
            samples = [sample.value for sample in cell.samples]
            values.append(cell.median)
            bar = axis.bar(
                group + (place - (len(names) - 1) / 2) * width, cell.median, width,
                color=COLOURS.get(who, "#8c564b"), hatch="//" if cell.at_least else None,
                edgecolor="white", linewidth=0.5, label=who,
                yerr=[[cell.median - min(samples)], [max(samples) - cell.median]],
                error_kw={"linewidth": 0.8},
            )  # fmt: skip
            text = (
                f"{'≥' if cell.at_least else ''}{cell.median:,.0f}"
                if cell.median >= 10
                else f"{cell.median:.2g}"
            )
            axis.bar_label(bar, [text], fontsize=6, padding=1)
    if values and max(values) > 20 * max(min(values), 1e-9):
        axis.set_yscale("log")
    axis.margins(y=0.15)
    axis.set_xticks(range(len(workloads)), [_short(each) for each in workloads], fontsize=8)
    _legend(axis)


def _lines(axis: "Axes", section: Section, workloads: list[str]) -> None:
    for who in section.contestants:
        points = [
            (float(workload.split(", ")[-1].split("x")[0]), cell.median)
            for workload in workloads
            if (cell := section.get(workload, who))
        ]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", label=who, color=COLOURS.get(who))
    axis.set_yscale("log")
    axis.set_xlabel("working set / RAM", fontsize=8)
    axis.grid(visible=True, which="major", alpha=0.3)
    _legend(axis)


def _short(workload: str) -> str:
    """Shorten a label by what the title says already; in two lines."""
    for kind in (equal_ram.REREAD, equal_ram.RANDOM, equal_ram.SKEWED, equal_ram.SCAN):
        workload = workload.removeprefix(f"{kind}, ")
    return workload.replace(", ", ",\n")


def _legend(axis: "Axes") -> None:
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axis.legend(unique.values(), unique.keys(), fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
