"""Many adapters: which pairs are compared, module by module, as labeled tables.

`sources` and `labels` list the adapters and their labels, `relations` how they are related; `walk`
reads and factors every module once, `spread` does so through an executor, `rows` names the columns,
`tables` assembles the tables, `similarity_matrix` compares all pairs, `inference` aggregates pairs
to runs. Conclusions are drawn in `lora_analysis.conclusions`.
"""

from lora_analysis.finding import Failure
from lora_analysis.studies.inference import RunInference, run_inference
from lora_analysis.studies.labels import label_facts, with_label_facts
from lora_analysis.studies.relations import (
    Relation,
    earlier_checkpoints,
    relation,
    run_key,
)
from lora_analysis.studies.result import Study
from lora_analysis.studies.similarity_matrix import SimilarityMatrix
from lora_analysis.studies.sources import ReadLater
from lora_analysis.studies.tables import MOST_IN_PAIRS, study

__all__ = [
    "MOST_IN_PAIRS",
    "Failure",
    "ReadLater",
    "Relation",
    "RunInference",
    "SimilarityMatrix",
    "Study",
    "earlier_checkpoints",
    "label_facts",
    "relation",
    "run_inference",
    "run_key",
    "study",
    "with_label_facts",
]
