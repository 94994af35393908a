"""The check of the books against the host: what the rows and the ledger say, and what is there.

================  ====================================================================================
module            what it compares
================  ====================================================================================
:mod:`.sandboxes` one sandbox after the other, under its lock: row, ledger, machine, files, reservation
:mod:`.host`      what is on the host below our directories and belongs to no sandbox
:mod:`.storage`   pools, their devices, loops and mounts; volumes; disks and images of apps
:mod:`.strays`    names in our directories that no book has
:mod:`.store`     staging directories, names and entries of the store
:mod:`.books`     the database in itself
:mod:`.check`     the table of all of them; mending; with and without a daemon
================  ====================================================================================

Rules. A *finding* names one thing exactly. Nothing is found by a pattern that another data directory's things could fit: paths are
below our own directories, processes carry one of our machines' directories as an argument. The host is looked at before the
books, and an intent is in the books before its thing is on the host: so what is on the host, not in the books, and still there
when it is looked at again belongs to nobody. What somebody is just working on is left alone and named as busy. Mending works twice.
"""
