"""What every benchmark script shares: its options, and its table in docs/results and on the terminal."""

import argparse
import contextlib
import csv
import datetime
import importlib
import importlib.metadata
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
FIELDS = ("date", "versions", "machine", "config", "contender", "metric", "value")

sys.path.insert(0, str(ROOT / "scripts"))
assets = importlib.import_module("assets")


def option(default: Any, help: str | None = None, choices: Iterable[Any] | None = None) -> dict[str, Any]:
    """An option for `parse`. A list as default takes many values, False none; a type has no default."""
    if default is False:
        return {"action": "store_true", "help": help}
    shared = {"help": help, "choices": choices and list(choices)}
    if isinstance(default, type):
        return {"type": default, **shared}
    many = isinstance(default, list)
    kind = type(default[0] if many else default)
    return {"type": kind, "default": default, **shared, **({"nargs": "*"} if many else {})}


class Options(argparse.Namespace):
    """The options of a run; as text, those that are numbers, for the conditions of a table."""

    def __str__(self) -> str:
        numbers = ((name, value) for name, value in vars(self).items() if type(value) in (int, float))
        return ", ".join(f"{name.replace('_', '-')} {value:g}" for name, value in numbers)


def parse(doc: str | None, **options: Any) -> Options:
    """The command line's options; `seq_len=2048` or `seq_len=option(2048, "tokens")` is `--seq-len`.

    Args:
        doc: the script's docstring, which `--help` shows.
        options: of `threads`, torch is given so many.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, given in options.items():
        given = given if isinstance(given, dict) else option(given)
        parser.add_argument("--" + name.replace("_", "-"), **given)
    parsed = parser.parse_args(namespace=Options())
    if "threads" in parsed:
        importlib.import_module("torch").set_num_threads(parsed.threads)
    return parsed


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """An empty folder on the project's drive (a temporary folder may be memory, which has no O_DIRECT)."""
    (ROOT / "out").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "out") as folder:
        yield Path(folder)


def machine() -> str:
    """CPU name, logical cores, memory, and the GPU if there is one."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    name = next(names, platform.processor() or platform.machine())
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    text = f"{name}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {gib:.0f} GiB"
    return f"{text}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else text


def versions() -> str:
    libraries = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    return " ".join([f"python {platform.python_version()}", *libraries])


class Table:
    """One published table: rows are contenders, columns are metrics.

    Args:
        name: file name in docs/results, without the ending; the CSV is append-only.
        title: what the printed table says above its rows.
        config: the conditions that a reader needs to rerun it (model, sizes, threads, repeats).
    """

    def __init__(self, name: str, title: str, config: str) -> None:
        self.name, self.title, self.config = name, title, config
        self.rows: dict[str, dict[str, float | str]] = {}

    def add(self, contender: str, **metrics: float | str) -> None:
        self.rows.setdefault(contender, {}).update(metrics)

    def finish(self) -> None:
        """Append the rows, if there are any, to docs/results/NAME.csv and print them."""
        if not self.rows:
            return
        path = RESULTS / f"{self.name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(FIELDS)
            for contender, metrics in self.rows.items():
                for metric, value in metrics.items():
                    value = f"{value:.6g}" if isinstance(value, float) else value
                    writer.writerow((date, versions(), machine(), self.config, contender, metric, value))
        self.print()

    def print(self) -> None:
        columns = list(dict.fromkeys(metric for metrics in self.rows.values() for metric in metrics))
        table = RichTable(title=self.title, caption=f"{self.config}\n{machine()}; {versions()}")
        table.add_column("")
        for column in columns:
            table.add_column(column.replace("_", " "), justify="right")
        for contender, metrics in self.rows.items():
            table.add_row(contender, *(_cell(metrics.get(column, "")) for column in columns))
        width = None if sys.stdout.isatty() else 160
        Console(width=width).print(table)


def _cell(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
