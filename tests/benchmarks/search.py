"""What each stage of the demo costs: wall and CPU seconds of a fresh run."""

import tempfile
from pathlib import Path

from search.config_file import load_config
from search.pipeline import run
from tests.benchmarks.record import ROOT, Row, record


def main() -> None:
    """Run the demo in a fresh folder."""
    config = load_config(ROOT / "configs" / "digits.yaml")
    with tempfile.TemporaryDirectory() as folder:
        summary = run(config, Path(folder) / "run", name="digits")
    rows = []
    for cost in summary.stages:
        rows.append(Row(f"demo, {cost.stage}", "", cost.seconds, "s wall"))
        rows.append(Row(f"demo, {cost.stage}", "", cost.cpu_seconds, "s CPU"))
    rows.append(Row("demo, all stages", "", sum(c.seconds for c in summary.stages), "s wall"))
    rows.append(Row("demo, all stages", "", sum(c.cpu_seconds for c in summary.stages), "s CPU"))
    record("search", rows)


if __name__ == "__main__":
    main()
