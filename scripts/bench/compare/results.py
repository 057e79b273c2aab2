"""Keep figures as they come in: section, workload, contestant, samples."""

import statistics
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """Holds one measurement."""

    value: float
    disk_mib: float | None = None
    """Read from the disk meanwhile."""
    at_least: bool = False
    """The time limit ended it: a lower bound."""


@dataclass
class Cell:
    """Holds one workload of one contestant."""

    unit: str
    samples: list[Sample] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Return the median of the values."""
        return statistics.median(sample.value for sample in self.samples)

    @property
    def at_least(self) -> bool:
        """Tell whether the median is a lower bound."""
        return any(sample.at_least for sample in self.samples)

    @property
    def disk_mib(self) -> float | None:
        """Return the median of what was read from the disk."""
        found = [sample.disk_mib for sample in self.samples if sample.disk_mib is not None]
        return statistics.median(found) if found else None

    def text(self) -> str:
        """Return median and spread, and what came from the disk."""
        values = [sample.value for sample in self.samples]
        text = ("≥ " if self.at_least else "") + number(self.median)
        if len(values) > 1:
            text += f" ({number(min(values))} to {number(max(values))})"
        if self.disk_mib is not None:
            text += f"; {self.disk_mib:,.0f}"
        return text

    def as_dict(self) -> dict[str, Any]:
        """Make a dict for the JSON."""
        return {
            "unit": self.unit,
            "median": self.median,
            "at_least": self.at_least,
            "values": [sample.value for sample in self.samples],
            "disk_mib": [sample.disk_mib for sample in self.samples],
        }


def number(value: float) -> str:
    """Format a number with three digits at least."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


@dataclass
class Section:
    """Holds one table: workloads by contestants."""

    title: str
    about: str
    cells: dict[str, dict[str, Cell]] = field(default_factory=dict)

    def add(self, workload: str, who: str, unit: str, sample: Sample) -> None:
        """Add one more measurement."""
        row = self.cells.setdefault(workload, {})
        row.setdefault(who, Cell(unit)).samples.append(sample)

    def get(self, workload: str, who: str) -> Cell | None:
        """Return what was measured, if it was."""
        return self.cells.get(workload, {}).get(who)

    def ratio(self, workload: str, who: str) -> Cell | None:
        """Divide cleanfs's values by another contestant's, round by round."""
        ours, theirs = self.get(workload, "cleanfs"), self.get(workload, who)
        if ours is None or theirs is None or ours is theirs:
            return None
        if len(ours.samples) != len(theirs.samples) or not all(each.value for each in theirs.samples):
            return None
        pairs = zip(ours.samples, theirs.samples, strict=True)
        return Cell("", [Sample(our.value / their.value) for our, their in pairs])

    @property
    def contestants(self) -> list[str]:
        """Return all of them, in order of appearance."""
        return list(dict.fromkeys(who for row in self.cells.values() for who in row))


@dataclass
class Results:
    """Holds everything, and what was skipped."""

    sections: dict[str, Section] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def section(self, name: str, title: str, about: str) -> Section:
        """Begin a new section."""
        return self.sections.setdefault(name, Section(title, about))

    def get(self, section: str, workload: str, who: str) -> Cell | None:
        """Return what was measured, if it was."""
        found = self.sections.get(section)
        return found.get(workload, who) if found else None
