"""Parallel work in threads, in processes, or on several machines; independent of what the work is.

`threads` is for arithmetic within one process. Executors take jobs of minutes or hours and retry
those whose worker died: `protocol` (the interface, and a serial one), `processes`, and `cluster`
(Ray). A job writes its results to disk itself, whole or not at all: nothing here stores results.
"""

from lora_analysis.execution.threads import available_workers, in_threads, keep_freed_memory

__all__ = ["available_workers", "in_threads", "keep_freed_memory"]
