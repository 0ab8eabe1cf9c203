"""Many adapters: labeled tables of spectra, pairs and amplifications, module by module.

`spec` states what a study is asked for, `module_walk` reads every module of every adapter once,
`module_analysis` and `pair_products` compute its numbers, `study_tables` and `pair_tables` build
the tables, `similarity_matrix` and `all_pairs` compare all pairs, `inference` tests over runs,
`group_shares` and `group_analysis` what a group has in common.
Conclusions are drawn in `lora_analysis.conclusions`.
"""

from lora_analysis.finding import Failure
from lora_analysis.studies.group_analysis import GroupAnalysis, SharedPart
from lora_analysis.studies.inference import RunInference, run_inference
from lora_analysis.studies.labels import label_facts, with_label_facts
from lora_analysis.studies.relations import Relation, earlier_checkpoints, relation, run_key
from lora_analysis.studies.result import Study
from lora_analysis.studies.similarity_matrix import SimilarityMatrix
from lora_analysis.studies.spec import MAX_PAIRS, ReadLater, StudySpec
from lora_analysis.studies.study_tables import study
from lora_analysis.studies.table_rows import DegeneracyLevel

__all__ = [
    "MAX_PAIRS",
    "DegeneracyLevel",
    "Failure",
    "GroupAnalysis",
    "ReadLater",
    "Relation",
    "RunInference",
    "SharedPart",
    "SimilarityMatrix",
    "Study",
    "StudySpec",
    "earlier_checkpoints",
    "label_facts",
    "relation",
    "run_inference",
    "run_key",
    "study",
    "with_label_facts",
]
