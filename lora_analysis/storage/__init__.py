"""Files: named tensors of every container, JSON documents, atomic writes, locks, bundled data.

Every number a file states is checked against the file's size before memory is reserved for it,
nothing that a file names is run, and nothing is memory-mapped (a file cut short under a map kills
the process). What the tensors mean, and which files belong together as an adapter or a base, is
not known here.
"""
