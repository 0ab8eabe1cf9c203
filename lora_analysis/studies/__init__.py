"""Many adapters: which pairs are compared, module by module, as labelled tables.

`relations` says how adapters are related, `walk` reads and factors every module once, `rows` names
the columns, `study` puts the tables together, `inference` goes from pairs to runs. Nothing is
judged here: `findings` turns the tables into sentences, and `report` shows both.
"""

from lora_analysis.studies.inference import RunInference, run_inference
from lora_analysis.studies.relations import REFERENCE, SHARED_SEED, Relation, relation
from lora_analysis.studies.tables import Failure, Progress, Study, study

__all__ = [
    "REFERENCE",
    "SHARED_SEED",
    "Failure",
    "Progress",
    "Relation",
    "RunInference",
    "Study",
    "relation",
    "run_inference",
    "study",
]
