"""A run's report inside a notebook: `report("runs/quickstart")` as the last line of a cell shows it there."""

from dataclasses import dataclass
from pathlib import Path

from lit_align.reporting.report import write_report


@dataclass(frozen=True)
class Report:
    """A written report, which a notebook shows.

    Args:
        path: The file, report.html.
        height: Height of the frame that shows it, in pixels.
    """

    path: Path
    height: int = 600

    def _repr_html_(self) -> str:
        """The page in a frame of its own, so that its style stays there."""
        page = self.path.read_text(encoding="utf-8").replace("&", "&amp;").replace("'", "&#39;")
        return f"<iframe sandbox srcdoc='{page}' style='width: 100%; height: {self.height}px; border: 0'></iframe>"


def report(run: str | Path, height: int = 600) -> Report:
    """Write the report of a run into its folder.

    Args:
        run: The run's folder, its `trainer.default_root_dir`.
        height: Height of the frame that shows it in a notebook, in pixels.

    Raises:
        UserError: the folder holds nothing to report.
    """
    return Report(write_report(run), height)
