"""Many adapters: which pairs are compared, module by module, as labelled tables.

`sources` and `labels` say which adapters there are and what they are, `relations` how they are
related; `walk` reads and factors every module once, `spread` has that done by an executor, `rows`
names the columns, `tables` puts them together, `atlas` sums up all pairs, `inference` goes from
pairs to runs. Nothing is judged here: `findings` turns the tables into sentences, and `report`
shows both.
"""

from lora_analysis.studies.atlas import Atlas
from lora_analysis.studies.inference import RunInference, run_inference
from lora_analysis.studies.labels import label_facts, with_label_facts
from lora_analysis.studies.relations import (
    EARLIER,
    OTHER_BASE,
    REFERENCE,
    SAME_RUN,
    SHARED_SEED,
    Relation,
    earlier_steps,
    relation,
    run_key,
)
from lora_analysis.studies.result import Study
from lora_analysis.studies.sources import Failure, ReadLater
from lora_analysis.studies.tables import MOST_IN_PAIRS, Progress, study

__all__ = [
    "EARLIER",
    "MOST_IN_PAIRS",
    "OTHER_BASE",
    "REFERENCE",
    "SAME_RUN",
    "SHARED_SEED",
    "Atlas",
    "Failure",
    "Progress",
    "ReadLater",
    "Relation",
    "RunInference",
    "Study",
    "earlier_steps",
    "label_facts",
    "relation",
    "run_inference",
    "run_key",
    "study",
    "with_label_facts",
]
