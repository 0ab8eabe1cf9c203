"""Results in; one HTML file, figures, tables and JSON out. Nothing is computed or judged here.

`selection` chooses what is shown, `figures` (with `weight_figures` and `module_figures`) and
`tables` prepare it, `sections` says where it stands, `writing` puts it on disk; `results`, `grids`
and `made` are what lies beside the page, and how it came about.
"""

from lora_analysis.report.figures import ReportFigure
from lora_analysis.report.results import results_schema
from lora_analysis.report.sections import FORMATS, DrawnFigure, Section, drawn_figures
from lora_analysis.report.tables import ReportTable
from lora_analysis.report.writing import write_page, write_report

__all__ = [
    "FORMATS",
    "DrawnFigure",
    "ReportFigure",
    "ReportTable",
    "Section",
    "drawn_figures",
    "results_schema",
    "write_page",
    "write_report",
]
