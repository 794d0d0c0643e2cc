"""Draw the latest run of every table in docs/results as one page, out/report.html.

python scripts/report.py [--out out/report.html]
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

TEMPLATE = Path(__file__).with_name("report.html.j2")
RESULTS = TEMPLATE.parent.parent / "docs" / "results"


def latest_run(path: Path) -> dict[str, Any]:
    """The rows that share the newest date of a results file."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    newest = max(row["date"] for row in rows)
    rows = [row for row in rows if row["date"] == newest]
    table: dict[str, dict[str, str]] = {}
    for row in rows:
        table.setdefault(row["contender"], {})[row["metric"]] = row["value"]
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    conditions = {key: rows[0][key] for key in ("date", "config", "machine", "versions")}
    return {"name": path.stem, "rows": table, "metrics": metrics, **conditions}


def plots(run: dict[str, Any]) -> list[dict[str, str]]:
    """One bar chart for each metric that is a number for at least two contenders."""
    drawn = []
    for metric in run["metrics"]:
        values = {name: _number(row.get(metric, "")) for name, row in run["rows"].items()}
        known = {name: value for name, value in values.items() if value is not None}
        if len(known) > 1 and len(set(known.values())) > 1:
            drawn.append({"metric": metric, "source": _bars(metric.replace("_", " "), known)})
    return drawn


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _bars(title: str, values: dict[str, float]) -> str:
    figure, axes = plt.subplots(figsize=(6.0, 0.6 + 0.28 * len(values)), layout="constrained")
    names = list(values)[::-1]
    bars = axes.barh(names, [values[name] for name in names], color="#4477aa", height=0.7)
    axes.bar_label(bars, fmt="%.4g", padding=3, fontsize=8)
    axes.set_title(title, loc="left", fontsize=10)
    axes.tick_params(labelsize=8)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/report.html"))
    out = parser.parse_args().out
    runs = [latest_run(path) for path in sorted(RESULTS.glob("*.csv"))]
    for run in runs:
        run["plots"] = plots(run)
    out.parent.mkdir(parents=True, exist_ok=True)
    page = jinja2.Template(TEMPLATE.read_text("utf-8"), autoescape=True)
    out.write_text(page.render(runs=runs), "utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
