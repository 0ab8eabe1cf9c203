"""Results in; one HTML file, figures, tables and JSON out. Nothing is computed or judged here.

`selection` chooses what is shown, `figures` and `tables` prepare it, `writing` puts it on disk.
"""

from lora_analysis.report.results import results_schema
from lora_analysis.report.writing import write_report

__all__ = ["results_schema", "write_report"]
