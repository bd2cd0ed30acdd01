"""python launcher/report.py run_dir=runs/quickstart"""

from lavit_dist.config.command_line import run_entry_point
from lavit_dist.config.report import ReportConfig
from pipelines.report import run

if __name__ == "__main__":
    run_entry_point(ReportConfig, run, "Render what a chain of stages left in its folder as one HTML file.")
