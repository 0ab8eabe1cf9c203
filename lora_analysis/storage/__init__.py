"""Files: named tensors of every container, JSON documents, atomic writes, locks, hub downloads.

Every number a file states is checked against the file's size before memory is reserved for it,
nothing that a file names is run, and nothing is memory-mapped (a file cut short under a map kills
the process). The meaning of tensors, and which files make up an adapter or a base, is left to
``formats`` and ``bases``.
"""
