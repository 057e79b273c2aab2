"""Write tables on the terminal, in Markdown and JSON."""

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .results import Results, Section
from .targets import judge


def show(results: Results, console: Console) -> None:
    """Show everything on the terminal."""
    for section in results.sections.values():
        if not section.cells:
            continue
        table = Table(
            "workload", "contestant", "median (spread); MiB from disk", "cleanfs over it",
            title=escape(section.title),
        )  # fmt: skip
        for workload, row in section.cells.items():
            for who, cell in row.items():
                ratio = section.ratio(workload, who)
                table.add_row(
                    escape(workload),
                    escape(who),
                    f"{cell.text()} {cell.unit}",
                    ratio.text() if ratio else "",
                )
            table.add_section()
        console.print(table)
    rows = judge(results)
    if rows:
        table = Table("target", "goal", "measured", "", title="targets")
        for judged in rows:
            table.add_row(*map(escape, judged))
        console.print(table)


SMALL = "The sizes of --quick are too small for the targets: what is fixed (a process) weighs too much."


def markdown(
    results: Results,
    facts: dict[str, str],
    command: str,
    minutes: float,
    plots: dict[str, Path],
    base: Path,
) -> str:
    """Write docs/benchmarks.md; pictures are named relative to base."""
    lines = ["## Everything side by side: `scripts/run bench/compare`"]
    lines += [", ".join(f"{name} {value}" for name, value in facts.items()) + "."]
    how = (
        f"`{command}`, {minutes:.0f} minutes; alternated rounds, medians, spread in brackets where "
        "there is more than one round. Ratios say more than figures."
    )
    lines.append(how)
    if "--quick" in command:
        lines.append(SMALL)
    if rows := judge(results):
        lines += ["", "| target | goal | measured | |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    for name, section in results.sections.items():
        if section.cells:
            lines += [
                "",
                f"### {section.title}",
                f"{section.about} {_rounds(section)}",
                "",
                *_table(section),
            ]
            if name in plots:
                lines += ["", f"![{section.title}]({os.path.relpath(plots[name], base)})"]
    if results.skipped:
        lines += ["", "### Skipped", *(f"* {line}" for line in results.skipped)]
    return "\n".join(lines) + "\n"


def _rounds(section: Section) -> str:
    counts = {len(cell.samples) for row in section.cells.values() for cell in row.values()}
    if counts == {1}:
        return "One round."
    return f"{min(counts)} to {max(counts)} rounds." if len(counts) > 1 else f"{counts.pop()} rounds."


def _table(section: Section) -> list[str]:
    names = section.contestants
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for workload, row in section.cells.items():
        unit = next(iter(row.values())).unit
        cells = [row[name].text() if name in row else "" for name in names]
        lines.append(f"| {workload}{f' [{unit}]' if unit else ''} | " + " | ".join(cells) + " |")
    return lines


def _ratio(section: Section, workload: str, who: str) -> dict[str, Any]:
    ratio = section.ratio(workload, who)
    return {"cleanfs_over_it": [sample.value for sample in ratio.samples]} if ratio else {}


def as_json(results: Results, facts: dict[str, str], command: str, minutes: float) -> str:
    """Return all values."""
    sections: dict[str, Any] = {
        name: {
            "title": section.title,
            "workloads": {
                workload: {
                    who: cell.as_dict() | _ratio(section, workload, who) for who, cell in row.items()
                }
                for workload, row in section.cells.items()
            },
        }
        for name, section in results.sections.items()
    }
    report = {
        "command": command,
        "minutes": minutes,
        "machine": facts,
        "targets": [
            dict(zip(("target", "goal", "measured", "verdict"), row, strict=True))
            for row in judge(results)
        ],
        "sections": sections,
        "skipped": results.skipped,
    }
    return json.dumps(report, indent=2, ensure_ascii=False) + "\n"
