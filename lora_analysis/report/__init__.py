"""Write a study as one HTML file with figures, tables and JSON; nothing is computed here.

`representatives` chooses pairs and modules, the modules named ``*_figures`` and ``*tables`` prepare
figures and tables, `sections` arranges them, `report_folder` writes the files. `results` holds the
files for programs, `provenance` how the report was made.
"""

from lora_analysis.report.report_folder import write_page, write_report
from lora_analysis.report.results import results_schema
from lora_analysis.report.sections import FORMATS, DrawnFigure, Section, draw_figures
from lora_analysis.report.similarity_figures import ReportFigure
from lora_analysis.report.tables import ReportTable

__all__ = [
    "FORMATS",
    "DrawnFigure",
    "ReportFigure",
    "ReportTable",
    "Section",
    "draw_figures",
    "results_schema",
    "write_page",
    "write_report",
]
