"""The numbers of one run, for the terminal."""

from collections.abc import Mapping

from rich.table import Table


def summary(metrics: Mapping[str, float | str]) -> Table:
    """metrics.json as a table of base and erased."""
    table = Table("", "base", "erased", box=None)
    for key, value in metrics.items():
        if key.startswith("base/") or isinstance(value, str):
            continue
        base = metrics.get(f"base/{key}")
        table.add_row(key, "" if base is None else f"{base:,.4g}", f"{value:,.4g}")
    return table
