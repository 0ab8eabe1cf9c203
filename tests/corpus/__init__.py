"""Files that nobody should send and somebody will: each with what the command line must say.

`cases` holds them as small functions that write into an empty folder and return what to point
at. Made anew for every test; ``python -m corpus FOLDER`` (in ``tests/``) writes them all out to
look at.
"""
