"""A CSV file that several processes fill, a row for each case, and its summary."""

import csv
import fcntl
from pathlib import Path


class Table:
    """Rows with these columns, the first of which is the number of the case."""

    def __init__(self, path, columns):
        self.path, self.columns = Path(path), columns
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, values):
        """Append one row."""
        with self.path.open("a", encoding="utf-8", newline="") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if not file.tell():
                writer.writeheader()
            writer.writerow({name: str(values.get(name, "")).replace("\n", " | ") for name in self.columns})

    def rows(self):
        """All rows, as dictionaries of texts."""
        if not self.path.exists():
            return []
        with self.path.open(encoding="utf-8", newline="") as file:
            return sorted(csv.DictReader(file), key=lambda row: int(row[self.columns[0]]))

    def done(self):
        """The numbers of the cases that are there."""
        return {int(row[self.columns[0]]) for row in self.rows()}

    def summary(self, by, most=()):
        """A line for each value of the column `by`: its cases by outcome, and the largest values of columns `most`."""
        groups = {}
        for row in self.rows():
            groups.setdefault(row[by], []).append(row)
        outcomes = sorted({row["outcome"] for row in self.rows()})
        lines = ["".join(f"{name:>14}" for name in ("cases", *outcomes, *(f"most {name}"[:13] for name in most)))]
        for name, rows in [*sorted(groups.items()), ("all", self.rows())]:
            numbers = [len(rows), *(sum(row["outcome"] == outcome for row in rows) for outcome in outcomes)]
            numbers += [max((float(row[column]) for row in rows if row[column]), default="") for column in most]
            lines.append("".join(f"{number:>14}" for number in numbers) + f"  {name}")
        return "\n".join(lines)
