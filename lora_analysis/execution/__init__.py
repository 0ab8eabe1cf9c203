"""Work spread over threads, processes, or machines; nothing here knows what the work is.

`threads` serves arithmetic within one process. Executors take cells of minutes or hours, each
tried again where its worker was lost: `serial`, `processes`, `cluster` (Ray), all with the
protocol in `protocol`; `shards` deals cells to jobs that know nothing of each other. What a cell
makes it writes to disk itself, whole or not at all: nothing here keeps results.
"""

from lora_analysis.execution.threads import available_workers, in_threads, keep_freed_memory

__all__ = ["available_workers", "in_threads", "keep_freed_memory"]
