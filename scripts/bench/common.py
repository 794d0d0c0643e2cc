"""What every benchmark script shares: its options, and its table in docs/results and on the terminal."""

from __future__ import annotations

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
FIELDS = ("date", "versions", "machine", "config", "contender", "metric", "value")

sys.path.insert(0, str(ROOT / "scripts"))
assets = importlib.import_module("assets")


@dataclass(frozen=True)
class Option:
    """An option of a script. Its default says what it takes: a list any number of values, False nothing, a type
    (`Path`) one value but has no default."""

    default: Any
    help: str | None = None
    choices: Iterable[Any] | None = None

    def as_argument(self) -> dict[str, Any]:
        default = self.default
        if default is False:
            return {"action": "store_true", "help": self.help}
        shared = {"help": self.help, "choices": self.choices and list(self.choices)}
        if isinstance(default, type):
            return {"type": default, **shared}
        if isinstance(default, list):
            return {"nargs": "*", "type": type(default[0]), "default": default, **shared}
        return {"type": type(default), "default": default, **shared}


class Options(argparse.Namespace):
    """The options of a run; as text, its numbers, for the conditions of a table."""

    def __str__(self) -> str:
        given = {name.replace("_", " "): value for name, value in vars(self).items()}
        return ", ".join(f"{name} {value:g}" for name, value in given.items() if type(value) in (int, float))


def parse(doc: str | None, **options: Any) -> Options:
    """The command line's options; `seq_len=2048` or `seq_len=Option(2048, "tokens")` is `--seq-len`.

    Args:
        doc: the script's docstring, which `--help` shows.
        options: `threads` are those of torch, which are set.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, given in options.items():
        option = given if isinstance(given, Option) else Option(given)
        parser.add_argument("--" + name.replace("_", "-"), **option.as_argument())
    found = parser.parse_args(namespace=Options())
    if "threads" in found:
        importlib.import_module("torch").set_num_threads(found.threads)
    return found


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """An empty folder on the project's drive (a temporary folder may be memory, which has no O_DIRECT)."""
    (ROOT / "out").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "out") as folder:
        yield Path(folder)


def machine() -> str:
    """CPU name, logical cores, memory, and the GPU if there is one."""
    import torch

    name = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    text = f"{name}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {gib:.0f} GiB"
    return f"{text}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else text


def versions() -> str:
    names = ("torch", "transformers")
    return " ".join(
        [f"python {platform.python_version()}", *(f"{n} {importlib.metadata.version(n)}" for n in names)]
    )


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
        """Append the rows to docs/results/NAME.csv and print them."""
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
